"""Training: resumable, exports a codec that works, and its estimates are those of real bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotam.bitstream import unpack
from cotam.codec import Codec
from cotam.config import Q_STEPS, CodecConfig, load_yaml
from cotam.entropy.rans import RansCoder
from cotam.entropy.tables import COUNTED_MAX, build_tables
from cotam.image import RGBImage
from cotam.models import averages
from cotam.models.codec_model import CodecModel
from cotam.train import codec as trainer_module
from cotam.train.codec import CodecTrainer
from cotam.train.config import CodecTrainConfig, DataConfig
from cotam.train.data import random_quality_maps
from cotam.train.gains import RealCost, tune_gains
from cotam.train.levels import _psnr, match_levels
from cotam.train.rates import code_length, count_symbols, segments_of
from cotam.train.run import train_codec
from cotam.weights import TierWeights, dump_codec, parse_codec, read_weights
from tests.corpus import photograph, to_bytes, write_tar, write_webdataset

SMALL = CodecConfig(
    M=32,
    M_levels=(8, 8, 16, 16, 16, 32, 32, 32),
    N8=8,
    N16=16,
    analysis_blocks=(1, 1),
    synthesis_blocks=(1, 1),
    N_z=8,
    N_hyper=16,
)

ELIC = CodecConfig(backbone="elic", N=8, M=16, N_z=8, N_hyper=8)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodecTrainConfig:
    monkeypatch.setattr(trainer_module, "_KLT_PATCHES", 1000)
    monkeypatch.setattr(averages, "_SAMPLES", 2**18)
    write_webdataset(tmp_path / "in", 2, 12, width=160, height=128)
    data = DataConfig(
        train=(str(tmp_path / "in/part-{0000..0000}.tar"),),
        evaluation=(str(tmp_path / "in/part-0001.tar"),),
        num_eval_images=4,
        eval_crop_px=128,
        num_workers=0,
    )
    return CodecTrainConfig(
        model=SMALL, data=data, crop_px=64, batch_size=4, max_steps=4, max_minutes=0, tuning_crops=4, table_crops=64
    )


@pytest.mark.parametrize(
    ("model", "optimizer"), [(SMALL, "adamw"), (SMALL, "soap"), (ELIC, "adamw")], ids=["cotam", "soap", "elic-vbr"]
)
def test_a_run_resumes_and_exports_a_codec(
    config: CodecTrainConfig, tmp_path: Path, model: CodecConfig, optimizer: str
) -> None:
    config = dataclasses.replace(config, model=model, optimizer=optimizer)
    out = tmp_path / "run"
    train_codec(config, out, "cpu")
    longer = dataclasses.replace(config, max_steps=8)
    weights = train_codec(longer, out, "cpu")
    resumed = CodecTrainer(longer, out)
    assert resumed.resumed and resumed.step == 8
    # Time goes on, crops and noise are others than before, and the optimizer knows what it knew.
    fresh = CodecTrainer(longer, tmp_path / "fresh")
    assert resumed.trained_s > 0 and resumed.seed != fresh.seed
    assert not torch.equal(next(resumed.batches()), next(fresh.batches()))
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["optimizers"]
    for optimizer_of_run, state in zip(resumed._optimizers, saved, strict=True):
        loaded = optimizer_of_run.state_dict()["state"]
        assert len(loaded) == len(state["state"]) > 0
        for parameter, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(loaded[parameter][name], value)

    codec = Codec.load(str(weights))
    image = np.zeros((70, 90, 3), np.uint8)
    importance = np.linspace(0, 1, 30).reshape(5, 6)
    assert codec.decode(codec.encode(image, importance=importance)).shape == image.shape
    assert codec.sha256 in (out / "codec.md").read_text()
    before = weights.read_bytes()
    assert train_codec(longer, out, "cpu").read_bytes() == before  # bitstreams name the model that wrote them

    other_settings = dataclasses.replace(longer, weight_decay=0.05, linear_lr_factor=0.5)
    for optimizer_of_run in CodecTrainer(other_settings, out)._optimizers:
        assert [group["factor"] for group in optimizer_of_run.param_groups] == [0.5, 1.0]
        assert {group["weight_decay"] for group in optimizer_of_run.param_groups} == {0.05}

    further = dataclasses.replace(config, max_steps=5)
    train_codec(further, tmp_path / "further", "cpu", init=str(weights))
    with pytest.raises(ValueError, match="another shape"):
        CodecTrainer(dataclasses.replace(config, model=CodecConfig(M=64)), out)
    other = "soap" if optimizer == "adamw" else "adamw"
    with pytest.raises(ValueError, match=f"was trained with {optimizer}"):
        CodecTrainer(dataclasses.replace(longer, optimizer=other), out)


def test_a_range_of_qualities_gets_a_model_of_its_own(config: CodecTrainConfig, tmp_path: Path) -> None:
    def trained(name: str, qualities: tuple[float, ...], init: Path | None) -> tuple[TierWeights, ...]:
        run = dataclasses.replace(config, qualities=qualities)
        weights = train_codec(run, tmp_path / name, "cpu", init=str(init) if init else None)
        return parse_codec(weights.read_bytes(), name).tiers

    def file(name: str) -> Path:
        return tmp_path / name / "codec.safetensors"

    (whole,) = trained("whole", (), None)
    upper = trained("upper", (4.5, 8.0), file("whole"))
    assert [tier.range for tier in upper] == [(4.5, 8), (1, 8)]
    assert _same(upper[1], whole) and not _same(upper[0], whole)
    three = trained("three", (1.0, 4.25), file("upper"))
    assert [tier.range for tier in three] == [(1, 4.25), (4.5, 8), (1, 8)]
    assert [tier.model.config.M for tier in three] == [16, 32, 32]
    assert _same(three[1], upper[0]) and _same(three[2], whole) and not _same(three[0], whole)
    last = trained("last", (), file("three"))
    assert [tier.range for tier in last] == [tier.range for tier in three]
    assert _same(last[0], three[0]) and _same(last[1], three[1]) and not _same(last[2], three[2])

    codec, image = Codec.load(str(file("last"))), np.full((64, 64, 3), 99, np.uint8)
    strings = [codec.encode(image, quality) for quality in (1, 4.25, 4.5, 8)]
    strings += [codec.encode(image, quality, np.eye(4), strength) for quality, strength in ((2, 2), (6, 1), (4, 3))]
    assert [unpack(s, 2**20).tier for s in strings] == [0, 0, 1, 1, 0, 1, 2]
    assert [decoded.shape for decoded in codec.decode_batch(strings)] == len(strings) * [image.shape]
    full = [*(last[0]._replace(lowest_quality=low) for low in (1.5, 2.0, 2.5, 3.0, 3.5)), *last]
    file("last").write_bytes(dump_codec(full))
    with pytest.raises(ValueError, match="has 8 models already"):
        trained("nine", (2.0, 4.0), file("last"))
    with pytest.raises(ValueError, match="qualities need --init"):
        train_codec(dataclasses.replace(config, qualities=(1.0, 4.25)), tmp_path / "none", "cpu")
    with pytest.raises(ValueError, match="qualities must be the lowest and the highest, within 1 and 8"):
        dataclasses.replace(config, qualities=(4.5, 9.0))


def test_levels_of_a_tier_are_as_faithful_as_those_beside_it(photos: dict[str, RGBImage]) -> None:
    """A model of the same rate-distortion whose levels lie elsewhere gets them back, the end of its range, too."""
    reference, model = (parse_codec(read_weights("cotam-base"), "packaged").tiers[-1].model for _ in range(2))
    crops = [torch.from_numpy(photos[name]).permute(2, 0, 1)[None, :, :192, :192] for name in ("astronaut", "chelsea")]
    tables = model.gains.log_gain, model.gains.log_ratio
    before = [table.detach().clone() for table in tables]
    with torch.no_grad():
        for table, old in zip(tables, before, strict=True):
            table[2:7] = 0.6 * old[2:7] + 0.4 * old[3:8]

    def psnrs(codec: CodecModel) -> Tensor:
        return _psnr(codec, crops, torch.tensor([low, *range(3 * Q_STEPS, high + 1, Q_STEPS)]))

    low, high = 3 * Q_STEPS - 2, 6 * Q_STEPS

    off = (psnrs(model) - psnrs(reference)).abs()
    assert off.min() > 0.5
    match_levels(model, reference, crops, (low, high))
    assert ((psnrs(model) - psnrs(reference)).abs() < 0.25 * off).all()
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[:2], old[:2]) and torch.equal(table[7:], old[7:])


def _same(a: TierWeights, b: TierWeights) -> bool:
    states = a.model.state_dict().values(), b.model.state_dict().values()
    return all(torch.equal(x, y) for x, y in zip(*states, strict=True))


def test_a_run_of_two_processes_goes_on_in_one_and_back(config: CodecTrainConfig, tmp_path: Path) -> None:
    """Ranks share the optimizer's work and its state; a checkpoint holds all of it, and each takes its part."""
    file, out = tmp_path / "config.yaml", tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    for num_processes, max_steps in ((2, 4), (1, 7), (2, 9)):
        longer = dataclasses.replace(config, optimizer="soap", max_steps=max_steps)
        file.write_text(json.dumps(dataclasses.asdict(longer)))
        if num_processes == 2:
            command = ["jobs.cli", "train", "codec", str(out), "--config", str(file), "--device", "cpu"]
            done = subprocess.run([*torchrun, *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            train_codec(longer, out, "cpu")
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        num_trained = sum(p.requires_grad for p in CodecModel(SMALL).parameters())
        assert state["step"] == max_steps
        assert [len(optimizer["state"]) for optimizer in state["optimizers"]] == [num_trained]
        assert state["optimizers"][0]["param_groups"][0]["step"] == max_steps
    Codec.load(str(out / "codec.safetensors"))


@pytest.mark.parametrize("on_device", [False, True], ids=["processes", "on the device"])
def test_what_is_no_image_does_not_end_a_training(config: CodecTrainConfig, tmp_path: Path, on_device: bool) -> None:
    """A bomb, a damaged PNG, a caption alone and bad tars beside one photograph; three quality levels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    photo = to_bytes(photograph(0, 160, 128), quality=90)
    members = [
        ("a.png", bomb),
        ("b.png", to_bytes(photograph(1), format="PNG")[:60]),
        ("c.txt", b"alone"),
        ("d.jpg", photo),
    ]
    write_tar(tmp_path / "mixed.tar", members)
    tars = (str(tmp_path / "mixed.tar"),)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "mixed.tar").read_bytes()[:1500])
    (tmp_path / "none.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(tmp_path / "twice.tar", [("d.jpg", photo), ("d.jpg", photo)])
    train = (*tars, *(str(tmp_path / f"{name}.tar") for name in ("cut", "none", "twice")))
    data = dataclasses.replace(config.data, train=train, evaluation=tars, on_device=on_device)
    model = dataclasses.replace(SMALL, lmbdas=(0.001, 0.01, 0.1), M_levels=(8, 16, 32))
    records: list[dict[str, Any]] = []
    CodecTrainer(dataclasses.replace(config, data=data, model=model), tmp_path / "run").run(records.append)
    assert [record["evaluation"]["quality"] for record in records if "evaluation" in record] == [1, 2, 3]


def test_training_lowers_the_loss(config: CodecTrainConfig, tmp_path: Path) -> None:
    trainer = CodecTrainer(dataclasses.replace(config, max_steps=120, warmup_steps=10, ema_decay=0.9), tmp_path / "run")
    records: list[dict[str, Any]] = []
    trainer.run(records.append)
    before = CodecTrainer(dataclasses.replace(config, max_steps=1), tmp_path / "short")
    first: list[dict[str, Any]] = []
    before.run(first.append)

    def cost(results: list[dict[str, Any]]) -> float:
        return next(r["evaluation"]["cost"] for r in results if r.get("evaluation", {}).get("quality") == 5)

    assert cost(records) < 0.99 * cost(first)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_an_overflow_costs_a_steps_gradients_alone(
    config: CodecTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    trainer = CodecTrainer(dataclasses.replace(config, optimizer=optimizer, max_steps=6), tmp_path / "run")
    losses, after_overflow = trainer.losses, []

    def overflowing(batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if trainer.step == 4:
            after_overflow.append(trainer.model.g_a.linear.weight.clone())
        loss, shown = losses(batch)
        return (loss * float("inf") if trainer.step == 3 else loss), shown

    monkeypatch.setattr(trainer, "losses", overflowing)
    trainer.run(lambda record: None)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert not torch.equal(trainer.model.g_a.linear.weight, after_overflow[0])


def test_estimated_bits_are_those_of_the_bitstream(
    codec: Codec, tiers: tuple[TierWeights, ...], photos: dict[str, RGBImage]
) -> None:
    image = photos["astronaut"]
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    for quality in (4, 7):
        q = torch.full((1, 1, x.shape[2] // 16, x.shape[3] // 16), (quality - 1.0) * Q_STEPS)
        with torch.no_grad():
            estimate = float(tiers[codec._tier_of(int(q[0, 0, 0, 0]))].model(x, q).bits.sum())
        string = unpack(codec.encode(image, quality), codec.max_pixels).string
        # Estimates are of Gaussians, the tables are fitted to what real symbols are.
        assert 0.95 * estimate < 8 * len(string) < estimate


def test_config_file_errors_name_the_key(tmp_path: Path, codec: Codec) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {M: 64, depth: 3}\n")
    with pytest.raises(ValueError, match=r"config.yaml.model: unknown key 'depth'"):
        load_yaml(CodecTrainConfig, file)
    file.write_text("crop_px: 100\n")
    with pytest.raises(ValueError, match=r"crop_px .* multiple of 64"):
        load_yaml(CodecTrainConfig, file)
    file.write_text("data: {eval_crop_px: 100}\n")
    with pytest.raises(ValueError, match=r"data.eval_crop_px .* multiple of 64"):
        load_yaml(CodecTrainConfig, file)
    for levels in ("[4, 8]", "[8, 8, 8, 8, 8, 8, 8, 6]", "[8, 8, 8, 8, 8, 8, 8, 66]", "[7, 8, 8, 8, 8, 8, 8, 8]"):
        file.write_text(f"model: {{M: 64, M_levels: {levels}}}\n")
        with pytest.raises(ValueError, match="M_levels"):
            load_yaml(CodecTrainConfig, file)
    file.write_text("learning_rate: fast\n")
    with pytest.raises(ValueError, match=r"config.yaml.learning_rate: .*'fast'"):
        load_yaml(CodecTrainConfig, file)
    file.write_text("learning_rate: 1e-3\nmodel: {lmbdas: [1e-5, 0.1]}\n")  # text for YAML
    config = load_yaml(CodecTrainConfig, file)
    assert config.learning_rate == 1e-3 and config.model.lmbdas == (1e-5, 0.1)
    for lmbdas in ("[0.1]", "[0.1, 0.01]", "[0.1, 0.1]", "[0, 0.1]"):
        file.write_text(f"model: {{lmbdas: {lmbdas}}}\n")
        with pytest.raises(ValueError, match="lmbdas must be two or more positive numbers that grow"):
            load_yaml(CodecTrainConfig, file)
    configs = Path(trainer_module.__file__).parent.parent / "configs"
    assert load_yaml(CodecTrainConfig, configs / "codec-base.yaml").model == codec.config
    assert load_yaml(CodecTrainConfig, configs / "codec-large.yaml").model == Codec.load("cotam-large").config


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(config: CodecTrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device here"):
        train_codec(config, tmp_path / "run", "cuda")


def test_training_goes_on_beside_a_codec_in_use(codec: Codec, photos: dict[str, RGBImage]) -> None:
    """What encoding caches must not be tensors that only inference can use."""
    codec.encode(photos["astronaut"][:64, :64])
    model = CodecModel(SMALL).train()
    out = model(torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 4, 4))
    (out.bits.mean() + out.x_hat.mean()).backward()
    assert model.h_a.embed.weight.grad is not None


def test_other_quality_levels_start_between_those_that_were_trained(tiers: tuple[TierWeights, ...]) -> None:
    old = tiers[-1].model
    same = old.with_lmbdas(old.config.lmbdas).state_dict()
    for name, tensor in old.state_dict().items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-5, atol=1e-5)

    lmbdas = old.config.lmbdas
    fewer = old.with_lmbdas(lmbdas[1::3])
    assert fewer.config.M_levels == old.config.M_levels[1::3]
    torch.testing.assert_close(fewer.gains.log_gain, old.gains.log_gain[1::3], rtol=1e-5, atol=1e-5)
    between = old.with_lmbdas((*((a * b) ** 0.5 for a, b in itertools.pairwise(lmbdas)), lmbdas[-1]))
    levels, filters = old.config.num_levels, old.z_context.weight.unflatten(0, (-1, old.config.num_levels))
    for k in range(levels - 1):
        here = torch.full((1, 1, 1, 1), float(k * Q_STEPS))
        middle = torch.full((1, 1, 1, 1), float(k * Q_STEPS + Q_STEPS // 2))
        in_use = between.gains.in_use[k * Q_STEPS][None, :, None, None]
        for now, before in ((between.gains.gain, old.gains.gain), (between.gains.inverse, old.gains.inverse)):
            torch.testing.assert_close(now(here), before(middle) * in_use)
        mixed = between.z_context.weight.unflatten(0, (-1, levels))[:, k]
        torch.testing.assert_close(mixed, (filters[:, k] + filters[:, k + 1]) / 2)


def test_tuned_gains_take_fewer_real_bits_at_equal_psnr(photos: dict[str, RGBImage]) -> None:
    """Gains of one group that were made worse come back, as far as bits and PSNR go."""
    model = parse_codec(read_weights("cotam-base"), "packaged").tiers[-1].model.freeze()
    crops = [torch.from_numpy(photos[name]).permute(2, 0, 1)[None, :, :192, :192] for name in ("astronaut", "chelsea")]
    image = photos["coffee"]

    def cost() -> tuple[float, float]:
        cost = RealCost(model, [torch.from_numpy(image).permute(2, 0, 1)[None, :, :176, :256]], 5 * Q_STEPS)()
        return cost.bits, -10 * math.log10(float(cost.mse))

    with torch.no_grad():
        model.gains.log_gain[5, 3:32] -= 0.8
    others = model.gains.log_gain[[3, 4, 6]].clone()
    worse = cost()
    lines: list[str] = []
    tune_gains(model, crops, range(5, 6), lines.append)
    better = cost()
    assert better[0] * math.exp(-0.2 * (better[1] - worse[1])) < 0.98 * worse[0]  # some 0.2 of the logarithm for a dB
    assert len(lines) == 1 and lines[0].startswith("gains of quality 6: ")
    assert torch.equal(model.gains.log_gain[[3, 4, 6]], others)


def test_rates_are_those_of_the_coder(photos: dict[str, RGBImage]) -> None:
    """Counts of symbols and lengths of codes, on latents of a photograph, beside the entropy coder's own bytes."""
    model = parse_codec(read_weights("cotam-base"), "packaged").tiers[-1].model.freeze()
    x, q = torch.from_numpy(photos["astronaut"]).permute(2, 0, 1)[None], torch.full((1, 1, 1, 1), 20.0)
    segments = segments_of(model, model.compress(x, q), q)
    counts = count_symbols(segments)
    assert counts.sum() == sum(len(symbols) for symbols, _ in segments)
    for symbols, rows in segments:
        for symbol, row in ((0, rows.max()), (1, rows.min())):
            assert (
                counts.reshape(-1, counts.shape[-1])[row, COUNTED_MAX + symbol]
                >= (symbols[rows == row] == symbol).sum()
            )
    tables = build_tables(counts)
    num_bytes = len(RansCoder(tables).encode(segments)[0])
    assert 0 < 8 * num_bytes - code_length(segments, tables) < 0.01 * 8 * num_bytes


def test_quality_maps_stay_in_their_span_and_are_uniform_as_often_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = random_quality_maps(2000, 8, (5, 12), 0.4, generator)
    assert maps.shape == (2000, 1, 8, 8)
    assert maps.unique().tolist() == list(range(5, 13))
    spread = maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))
    assert 0.4 < (spread == 0).float().mean() < 0.55  # a narrow map is uniform, too
    first = maps[spread == 0][:, 0, 0, 0]
    assert (torch.bincount(first.long())[5:] > 0.05 * len(first)).all()
    assert (spread >= 4).float().mean() > 0.1
