"""A grown codec computes what the smaller one did, and what it has more of takes part in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cotam.config import CodecConfig
from cotam.entropy.tables import build_tables
from cotam.models.codec_model import CodecModel, interpolated_lmbdas, rate_distortion_loss
from cotam.models.growth import grown
from cotam.train.config import CodecTrainConfig, DataConfig
from cotam.train.run import train_codec
from cotam.weights import TierWeights, dump_codec, parse_codec
from tests.corpus import write_webdataset

SMALL = CodecConfig(M=16, N8=8, analysis_blocks=(1, 0), synthesis_blocks=(1, 0), N_z=8, N_hyper=16)
LARGE = dataclasses.replace(SMALL, N8=12, analysis_blocks=(2, 0), synthesis_blocks=(3, 0))


@pytest.fixture
def small() -> CodecModel:
    torch.manual_seed(0)
    model = CodecModel(SMALL)
    for parameter in model.parameters():  # nothing is zero any more, as after a training
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def test_a_grown_codec_is_the_same_function(small: CodecModel) -> None:
    large = grown(small, LARGE)
    assert large.config == LARGE
    x, q = torch.rand(2, 3, 64, 128), torch.randint(0, SMALL.num_q, (2, 1, 4, 8)).float()
    with torch.no_grad():
        before, after = (model.eval()(x, q) for model in (small, large))
    assert torch.allclose(before.x_hat, after.x_hat, atol=1e-6)
    assert torch.allclose(before.bits, after.bits, rtol=1e-4)


def test_all_that_is_new_learns(small: CodecModel) -> None:
    large = grown(small, LARGE)
    start = {name: p.detach().clone() for name, p in large.named_parameters()}
    optimizer = torch.optim.SGD(large.parameters(), lr=1e-4)
    x, q = torch.rand(2, 3, 64, 64), torch.full((2, 1, 4, 4), 20.0)
    for _ in range(4):  # from the last layers, which listen to what is new after one step, backwards
        optimizer.zero_grad()
        rate_distortion_loss(large(x, q), x, q, interpolated_lmbdas(LARGE)).backward()
        optimizer.step()
    for name, parameter in large.named_parameters():
        if ".body." in name:
            moved = (parameter != start[name]).float().mean()
            assert moved > 0.9, name


def test_only_larger_bodies_can_be_grown(small: CodecModel) -> None:
    for changes in ({"N8": 4}, {"analysis_blocks": (0, 0)}, {"synthesis_blocks": (1, 1)}, {"M": 32, "N8": 16}, {}):
        with pytest.raises(ValueError, match="only N8 and the numbers of blocks at 1/8 can grow"):
            grown(small, dataclasses.replace(SMALL, **changes))


def test_training_goes_on_in_a_larger_shape(small: CodecModel, tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    file.write_bytes(dump_codec([TierWeights(1, SMALL.num_levels, small, build_tables())]))
    write_webdataset(tmp_path / "in", 1, 8, width=96, height=96)
    data = DataConfig(train=(str(tmp_path / "in/*.tar"),), num_workers=0, on_device=True)
    config = CodecTrainConfig(
        model=LARGE, data=data, crop_px=64, batch_size=2, max_steps=2, max_minutes=0, tuning_crops=0, table_crops=8
    )
    with pytest.raises(ValueError, match="is smaller: a model for all qualities grows first"):
        train_codec(dataclasses.replace(config, qualities=(1, 4)), tmp_path / "run", "cpu", str(file))
    exported = train_codec(config, tmp_path / "run", "cpu", str(file))
    (tier,) = parse_codec(exported.read_bytes(), "exported").tiers
    assert tier.model.config == LARGE
