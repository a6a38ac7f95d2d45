"""Importance: the attention is CLIP's own, the early exit pays, and any image gets a map that steers the codec."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file

from cotam.bitstream import unpack
from cotam.codec import Codec
from cotam.image import RGBImage, decode_image, encode_image
from cotam.importance import Attention, estimate
from cotam.importance.estimate import ImportanceEstimator
from cotam.importance.source import from_member
from cotam.importance.tower import AttentionTower, needs_quick_gelu
from cotam.picture import write_picture
from cotam.store.schema import Reject, Row, Sample
from cotam.stream import Steering, encode_stream

HALF = (0.5, 0.5, 0.5)


def _tiny(image_size: int = 64) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size, 8, width=32, layers=4, heads=2, mlp_ratio=2.0, output_dim=16)


@pytest.fixture(scope="module")
def estimator() -> ImportanceEstimator:
    return ImportanceEstimator(AttentionTower(_tiny(), 2, HALF, HALF))


def _attention_with_hooks(visual: VisionTransformer, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Every token's attention in the full forward pass, (B, tokens, tokens), by torch's own attention module."""
    block = visual.transformer.resblocks[layer - 1]
    seen: list[torch.Tensor] = []
    handle = block.ln_1.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode():
        visual(x)
        weights = block.attn(seen[0], seen[0], seen[0], need_weights=True, average_attn_weights=True)[1]
    handle.remove()
    return weights  # type: ignore[no-any-return]


def test_attention_and_cost_of_vit_l_14_336() -> None:
    """Random weights: the attention of the full forward pass, for no more than the share of its layers plus 15 %."""
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-L-14-336")
    visual = _build_vision_tower(config["embed_dim"], open_clip.CLIPVisionCfg(**config["vision_cfg"])).eval()
    layer, num_layers = 6, len(visual.transformer.resblocks)
    pixels = torch.randint(0, 256, (1, 3, 336, 336), dtype=torch.uint8)
    x = (pixels.float() / 255 - 0.5) / 0.5

    def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        start = time.process_time()  # of all threads, whatever else the machine is doing
        result = run()
        return time.process_time() - start, result

    full = [timed(lambda: _attention_with_hooks(visual, layer, x)) for _ in range(2)]
    tower = AttentionTower(visual, layer, HALF, HALF)
    assert len(tower.visual.transformer.resblocks) == layer
    early = [timed(lambda: tower(pixels)) for _ in range(3)]
    np.testing.assert_allclose(early[0][1].flatten(1), full[0][1][:, 0, 1:], rtol=1e-4)
    assert min(s for s, _ in early) <= 1.15 * layer / num_layers * min(s for s, _ in full)


@pytest.mark.parametrize("layer", [1, 4])
def test_first_and_last_layer_can_be_read(layer: int) -> None:
    visual = _tiny().eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = _attention_with_hooks(visual, layer, (pixels / 255 - 0.5) / 0.5)
    actual = AttentionTower(visual, layer, HALF, HALF)(pixels)
    np.testing.assert_allclose(actual.flatten(1), expected[:, 0, 1:], rtol=1e-4)

    of_class, of_patches = expected[:, 0, 1:], expected[:, 1:, 1:].mean(1)
    both = (of_class / of_class.sum(1, keepdim=True) + of_patches / of_patches.sum(1, keepdim=True)) / 2
    actual = AttentionTower(_tiny().eval(), layer, HALF, HALF, "all")(pixels)
    np.testing.assert_allclose(actual.flatten(1), both, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (5, 900), (900, 5), (48, 96), (300, 200)])
def test_any_size_gets_a_map_of_its_aspect(estimator: ImportanceEstimator, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    (importance,) = estimator([image])
    assert importance.dtype == np.float32
    assert importance.min() == 0
    assert importance.max() == 1 or importance.size == 1
    if min(size) > 40:
        assert 0.7 < importance.shape[0] / importance.shape[1] * size[1] / size[0] < 1.4


def test_batches_of_mixed_sizes_change_nothing(estimator: ImportanceEstimator, photos: dict[str, RGBImage]) -> None:
    images = [*photos.values(), *(np.rot90(p) for p in photos.values())]
    for together, alone in zip(estimator(images), (estimator([i])[0] for i in images), strict=True):
        np.testing.assert_allclose(together, alone, atol=0.03)  # products of other sizes round otherwise in bfloat16


def test_bfloat16_hardly_moves_a_map(photos: dict[str, RGBImage], monkeypatch: pytest.MonkeyPatch) -> None:
    maps = []
    for in_bfloat16 in (False, True):
        monkeypatch.setattr(estimate, "computes_in_bfloat16", lambda device, answer=in_bfloat16: answer)
        estimator = ImportanceEstimator(AttentionTower.load(Attention()))
        assert next(estimator.tower.visual.parameters()).dtype == (torch.bfloat16 if in_bfloat16 else torch.float32)
        maps.append(np.concatenate([m.ravel() for m in estimator([*photos.values()])]))
    assert 0 < np.sqrt(np.mean((maps[0] - maps[1]) ** 2)) < 0.01
    assert np.abs(maps[0] - maps[1]).max() < 0.1


@pytest.mark.parametrize("size", [(375, 500), (31, 40), (5, 9000), (2000, 3000)])
def test_views_are_made_smaller_as_by_pillow(estimator: ImportanceEstimator, size: tuple[int, int]) -> None:
    image = np.resize(skimage.data.astronaut(), (*size, 3))
    image.flags.writeable = False  # as decoded images are
    (view, *_) = estimator._views(0, image)
    by_pillow = Image.fromarray(image).resize(view.pixels.shape[:0:-1], Image.Resampling.BICUBIC)
    off = np.abs(view.pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(by_pillow))
    assert off.max() <= 8 and off.mean() < 0.1


def test_large_images_are_looked_at_in_tiles_which_share_out_what_the_whole_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tower that attends to bright patches: a mark in any corner of a large, long image is found where it is."""
    estimator = ImportanceEstimator(AttentionTower(_tiny(), 2, HALF, HALF))

    def brightness(tower: AttentionTower, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float().mean(1), 8) ** 2

    monkeypatch.setattr(AttentionTower, "forward", brightness)
    for top, left in ((24, 40), (24, 700), (330, 40), (330, 700)):
        image = np.full((384, 768, 3), 40, np.uint8)
        image[top : top + 24, left : left + 24] = 250
        (importance,) = estimator([image])
        rows, columns = importance.shape
        assert (rows, columns) > (8, 16)  # finer than the tower's grid
        middle = top + 12
        at_mark, elsewhere_in_its_tile = (
            importance[y * rows // 384, (left + 12) * columns // 768]
            for y in (middle, 2 * (middle // 128 * 128) + 128 - middle)  # upside down
        )
        assert at_mark > 0.95 and elsewhere_in_its_tile < 0.5
        where = np.argwhere(importance >= 0.95)
        assert (np.abs((where + 0.5) * (384 / rows, 768 / columns) - (middle, left + 12)) < 64).all()
    (plain,) = estimator([np.full((384, 768, 3), 40, np.uint8)])
    assert not plain.any()
    (small,) = estimator([np.zeros((64, 64, 3), np.uint8)])
    assert small.shape == (8, 8)


def test_positions_of_other_grids_keep_rows_and_columns_apart() -> None:
    tower = AttentionTower(_tiny(), 2, HALF, HALF)
    ramps = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), dim=2)  # row, column
    with torch.no_grad():
        tower.visual.positional_embedding[1:, :2] = ramps.flatten(0, 1)
    rows, columns = tower._positions(4, 16, torch.float32, torch.device("cpu"))[1:, :2].unflatten(0, (4, 16)).unbind(2)
    np.testing.assert_allclose(rows, ((torch.arange(4) + 0.5) * 2 - 0.5)[:, None].expand(4, 16), atol=0.3)
    np.testing.assert_allclose(columns, ((torch.arange(16) + 0.5) / 2 - 0.5)[None].expand(4, 16), atol=0.3)


def test_whatever_changes_attention_changes_the_fingerprint() -> None:
    def fingerprint(mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF, **changes: object) -> str:
        visual = _tiny()
        for name, value in changes.items():
            setattr(visual.transformer.resblocks[0].attn if name == "num_heads" else visual, name, value)
        return AttentionTower(visual, 2, mean, std).fingerprint()

    found = [
        fingerprint(),
        fingerprint(mean=(0.5, 0.5, 0.4)),
        fingerprint(std=(0.5, 0.5, 0.4)),
        fingerprint(num_heads=4),
    ]
    assert len({*found}) == len(found) and fingerprint() == found[0]


def test_other_towers_and_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain ViT"):
        AttentionTower(torch.nn.Conv2d(3, 3, 1), 1, HALF, HALF)
    with pytest.raises(ValueError, match=r"layer 5 is outside \[1, 4\]"):
        AttentionTower(_tiny(), 5, HALF, HALF)
    for name in ("ViT-B-32", "nothing:openai", "ViT-B-32:nothing", f"ViT-B-32:{tmp_path}/missing.safetensors"):
        with pytest.raises(ValueError, match=r"ARCHITECTURE:PRETRAINED|no safetensors file"):
            AttentionTower.load(Attention(clip=name, layer=1))


def test_openai_weights_get_their_own_activation() -> None:
    assert needs_quick_gelu("ViT-L-14-336", "openai")
    assert not needs_quick_gelu("ViT-L-14", "laion2b_s32b_b82k")
    assert not needs_quick_gelu("ViT-L-14-336", "some/file.safetensors")


def test_a_local_checkpoint_is_loaded_and_has_an_identity(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "test-tiny.json")
    torch.manual_seed(1)
    model = open_clip.create_model("test-tiny")
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    name = f"test-tiny:{tmp_path / 'tiny.safetensors'}"
    tower = AttentionTower.load(Attention(clip=name, layer=2))
    torch.testing.assert_close(tower.visual.conv1.weight, model.visual.conv1.weight)
    assert tower.fingerprint() == AttentionTower.load(Attention(clip=name, layer=2)).fingerprint()
    assert tower.fingerprint() != AttentionTower.load(Attention(clip=name, layer=1)).fingerprint()


def test_encoding_is_steered_by_attention(
    codec: Codec, estimator: ImportanceEstimator, photos: dict[str, RGBImage]
) -> None:
    samples = [Sample(key=k, source="s", image=encode_image(p)) for k, p in photos.items()]
    steering = Steering(lambda samples, images: estimator(images), strength=4.0, keep_map=True)
    rows = list(encode_stream(samples, codec, 4.0, 2, steering))
    for row, image in zip(rows, photos.values(), strict=True):
        assert isinstance(row, Row)
        (importance,) = estimator([image])
        assert row.importance is not None
        np.testing.assert_allclose(row.importance, importance, atol=1e-4)
        assert row.mean_importance == pytest.approx(importance.mean(), abs=1e-4)
        assert unpack(row.bitstream, codec.max_pixels).map_code is not None
        assert codec.decode(row.bitstream).shape == image.shape


def test_importance_can_be_a_member_of_the_sample(codec: Codec, photos: dict[str, RGBImage]) -> None:
    image = encode_image(photos["coffee"])
    good = np.zeros((4, 6))
    good[1:3, 2:4] = 1

    def npy(array: object, **options: bool) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array, **options)  # type: ignore[arg-type]
        return buffer.getvalue()

    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
    zipped = io.BytesIO()
    np.savez(zipped, good)
    members: dict[str, tuple[object, str]] = {
        "npy": (npy(good), ""),
        "list": (good.tolist(), ""),
        "range": (npy(2 * good), "2-D map of values in"),
        "nan": (npy(good * np.nan), "2-D map of values in"),
        "flat": (npy(good.ravel()), "2-D map of values in"),
        "text": (b"not an array", "not a .npy file"),
        "zip": (zipped.getvalue(), "not a .npy file"),
        "bad zip": (b"PK\x03\x04...", "not a .npy file"),
        "huge": (huge.getvalue(), "header and its size do not fit"),
        "cut": (npy(good)[:-8], "header and its size do not fit|no array of numbers"),
        "damaged": (npy(good).replace(b"(4, 6)", b"(4, 6 "), "no array of numbers"),
        "pickle": (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "header and its size do not fit"),
        "ragged": ([[0.0], [0.0, 1.0]], "no array of numbers"),
        "missing": (None, "no member 'map'"),
    }
    samples = [Sample(key=k, source="s", image=image, members={"map": m}) for k, (m, _) in members.items()]
    results = dict(zip(members, encode_stream(samples, codec, 4.0, 2, Steering(from_member("map"), 4.0)), strict=True))
    bitstreams = {k: r.bitstream for k, r in results.items() if isinstance(r, Row)}
    expected = codec.encode(photos["coffee"], 4.0, good, 4.0)
    assert bitstreams == {"npy": expected, "list": expected}
    for key in set(members) - set(bitstreams):
        reject = results[key]
        assert isinstance(reject, Reject)
        assert reject.stage == "importance"
        assert reject.image == image
        assert re.search(members[key][1], reject.error)


def test_a_picture_shows_where_bits_went(codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = np.ascontiguousarray(skimage.data.coffee()[:256, :384])
    (tmp_path / "in/cup.png").write_bytes(encode_image(image))
    importance = np.zeros((16, 24), np.float32)
    importance[4:12, 8:16] = 1
    sample = Sample(
        key="cup.png", source=str(tmp_path / "in"), image=encode_image(image), members={"map": importance.tolist()}
    )
    (row,) = encode_stream([sample], codec, 4.0, 1, Steering(from_member("map"), 4.0, keep_map=True))
    assert isinstance(row, Row)
    quality, bits = codec.quality_and_bits(row.bitstream)
    assert quality[6, 10] - quality[0, 0] == 4
    assert bits[importance > 0].mean() > 2 * bits[importance == 0].mean()
    assert 0.8 < bits.sum() / (8 * len(row.bitstream)) < 1
    for name, source in (("whole.png", row), ("bare.png", dataclasses.replace(row, source="/gone", importance=None))):
        write_picture(source, codec, tmp_path / name)
        assert decode_image((tmp_path / name).read_bytes()).pixels.shape == (750, 1500, 3)
