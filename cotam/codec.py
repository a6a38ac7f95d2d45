"""The facade: images to byte strings and back, one at a time or in batches of mixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cotam.bitstream import MODEL_ID_BYTES, Bitstream, BitstreamError, ModelMismatchError, pack, unpack
from cotam.config import Q_STEPS
from cotam.entropy.quality_map import decode_quality_map, encode_quality_map
from cotam.entropy.rans import RansDecoder, RansError
from cotam.entropy.trellis import coded_segment, decode_levels
from cotam.grouping import in_groups
from cotam.image import MAX_PIXELS, RGBImage, check_rgb, latent_size, size_problem
from cotam.importance import DEFAULT_STRENGTH
from cotam.memory import keep_freed_memory
from cotam.models.codec_model import as_coded
from cotam.models.transfer import to_device, to_host
from cotam.models.turns import give_way, turn_on
from cotam.tier import QualityIndex, Tier
from cotam.weights import LoadedCodec, parse_codec, read_weights

A = TypeVar("A")
B = TypeVar("B")
Group = tuple[int, int, bool, int, int]  # latent height and width, whether the quality is uniform, tier, channels
# Latent positions in a batch on a GPU: 33 megapixels, some 2 GiB of features.
_MAX_BATCH_POSITIONS = 2**17
_MAX_STRENGTH = 1e6  # beyond it float32 does not resolve single levels


class CompressedImage(NamedTuple):
    """One image between the network and the entropy coder.

    width, height: of the image, in pixels. quality_index: int, or uint8 (h, w) for a map. tier: number of the tier. z:
    int16 (N_z, hz, wz), less its prediction. levels, rows: int16 and uint8 (2, h, w, m/2), the halves of y relative to
    its means, and their scale indexes, m being the number of channels of the image's highest quality.
    """

    width: int
    height: int
    quality_index: QualityIndex
    tier: int
    z: NDArray[np.int16]
    levels: NDArray[np.int16]
    rows: NDArray[np.uint8]


class DecompressedImage(NamedTuple):
    """One image between the entropy decoder and the synthesis.

    y_fixed: (2, m/2, h, w), the halves of y_hat: integers in float32, units of 1/MEAN_STEPS.
    """

    width: int
    height: int
    quality_index: QualityIndex
    tier: int
    y_fixed: Tensor


class _Opened(NamedTuple):
    """A bitstream whose container and quality map have been read; its latents come next from ``decoder``."""

    width: int
    height: int
    quality_index: QualityIndex
    tier: int
    decoder: RansDecoder


class Codec:
    """Encodes and decodes images with the models of one file. Thread-safe.

    On a CPU it tells the C library to keep freed memory for reuse (``cotam.memory``).

    Args:
        loaded: the model with its tables and identity.
        device: where the networks run; entropy coding always runs on the CPU.
        max_pixels: larger images are refused, in encoding and in decoding.

    Attributes:
        config: the shape of its last model. tiers: its models, the most special first. sha256, model_id: of its file.
    """

    def __init__(self, loaded: LoadedCodec, device: str = "cpu", max_pixels: int = MAX_PIXELS) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.config = loaded.config
        self.tiers = tuple(Tier(weights, self.device) for weights in loaded.tiers)
        self.sha256 = loaded.sha256
        self.model_id = bytes.fromhex(loaded.sha256)[:MODEL_ID_BYTES]
        self.max_pixels = max_pixels

    @classmethod
    def load(cls, name_or_path_or_uri: str = "cotam-base", device: str = "cpu", max_pixels: int = MAX_PIXELS) -> Codec:
        """Load packaged weights by name, or a codec file from a path or fsspec URI.

        Raises:
            FileNotFoundError: no such name or file.
            ValueError: not a codec file, damaged, or of another format version.
        """
        return cls(parse_codec(read_weights(name_or_path_or_uri), name_or_path_or_uri), device, max_pixels)

    def encode(
        self,
        image: RGBImage,
        quality: float = 4.0,
        importance: NDArray[np.floating] | None = None,  # type: ignore[type-arg]
        strength: float = DEFAULT_STRENGTH,
    ) -> bytes:
        """Encode one image.

        Args:
            image: uint8 RGB (H, W, 3).
            quality: level in [1, L] (8 for cotam-base), fractions allowed to a quarter.
            importance: float map in [0, 1] of any size, resized to the latent grid; None for a uniform quality.
            strength: how many levels an importance of 1 lies above one of 0.

        Raises:
            ValueError: not an RGB image, over ``max_pixels``, a quality or importance out of range.
        """
        return self.encode_batch([image], quality, None if importance is None else [importance], strength)[0]

    def decode(self, data: bytes) -> RGBImage:
        """Decode one byte string to uint8 RGB (H, W, 3).

        Raises:
            BitstreamError: not a whole, unaltered bitstream.
            ModelMismatchError: a bitstream of another model.
        """
        return self.decode_batch([data])[0]

    def encode_batch(
        self,
        images: Sequence[RGBImage],
        quality: float = 4.0,
        importances: Sequence[NDArray[np.floating] | None] | None = None,  # type: ignore[type-arg]
        strength: float = DEFAULT_STRENGTH,
        executor: Executor | None = None,
    ) -> list[bytes]:
        """Encode images of mixed sizes; as ``encode``, in the order of ``images``.

        ``executor`` (threads) runs the entropy coding of different images at the same time.
        """
        maps = importances if importances is not None else [None] * len(images)
        if len(maps) != len(images):
            raise ValueError(f"{len(images)} images, but {len(maps)} importance maps")
        quality_indexes = [
            self.quality_index(quality, image, importance, strength)
            for image, importance in zip(images, maps, strict=True)
        ]
        return _map(executor, self.pack, self.compress(images, quality_indexes))

    def decode_batch(self, strings: Sequence[bytes], executor: Executor | None = None) -> list[RGBImage]:
        """Decode byte strings of images of mixed sizes; as ``decode``, in the order of ``strings``."""
        return self.reconstruct(self.decompress(strings, executor))

    def quality_index(
        self,
        quality: float,
        image: RGBImage,
        importance: NDArray[np.floating] | None,  # type: ignore[type-arg]
        strength: float,
    ) -> QualityIndex:
        """The quality index of a uniform ``quality``, or the map of an importance map: uint8 on the latent grid.

        quality_map = round and clip of quality + strength * (importance - its mean), to whole levels, since finer ones
        cost the map more than they save. Arguments and errors as in ``encode``.
        """
        check_rgb(image)
        num_levels = self.config.num_levels
        if not 1 <= quality <= num_levels:
            raise ValueError(f"quality {quality} is outside [1, {num_levels}]")
        uniform = round((quality - 1) * Q_STEPS)
        if importance is None or strength == 0:
            return uniform
        values = torch.as_tensor(np.ascontiguousarray(importance, dtype=np.float32))
        if values.ndim != 2 or values.numel() == 0 or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("importance must be a 2-D map of values in [0, 1]")
        if not abs(strength) <= _MAX_STRENGTH:
            raise ValueError(f"strength {strength} is outside [-{_MAX_STRENGTH:g}, {_MAX_STRENGTH:g}]")
        size = latent_size(*image.shape[:2])
        if values.shape != size:
            values = F.interpolate(values[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
        levels = (quality - 1 + strength * (values - values.mean())).round().clamp(0, num_levels - 1)
        indexes = (levels * Q_STEPS).numpy().astype(np.uint8)
        return uniform if (indexes == indexes.flat[0]).all() else indexes

    def quality_and_bits(self, data: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where the bits of a bitstream go.

        Returns:
            On the latent grid, each float32 (h, w): the quality level, and the bits of ``y`` by the model's estimate.

        Raises:
            As ``decode``.
        """
        opened = self._open(data)
        h, w = latent_size(opened.height, opened.width)
        bits = torch.zeros(h, w)
        self._decompress_group([opened], None, bits)
        quality = 1 + np.broadcast_to(np.asarray(opened.quality_index, dtype=np.float32), (h, w)) / Q_STEPS
        return quality, bits.numpy()

    def mean_quality(self, quality_index: QualityIndex) -> float:
        """The mean quality level of an image."""
        return 1 + float(np.mean(quality_index)) / Q_STEPS

    def compress(self, images: Sequence[RGBImage], quality_indexes: Sequence[QualityIndex]) -> list[CompressedImage]:
        """The device stage of encoding: the networks, in batches of images of one latent size. Errors as ``encode``."""
        for image in images:
            check_rgb(image)
            if problem := size_problem(image.shape[1], image.shape[0], self.max_pixels):
                raise ValueError(f"image of {problem}")
        keys = [
            self._group(*latent_size(*i.shape[:2]), q, self._tier_of(q))
            for i, q in zip(images, quality_indexes, strict=True)
        ]
        return in_groups(
            keys,
            self._group_size,
            lambda at: self._compress_group([images[i] for i in at], [quality_indexes[i] for i in at]),
        )

    def pack(self, compressed: CompressedImage) -> bytes:
        """The CPU stage of encoding: entropy coding and the container."""
        q, tier = compressed.quality_index, self.tiers[compressed.tier]
        h, w = compressed.levels.shape[1:3]
        segments = [
            tier.z_segment(compressed.z, q, h, w),
            coded_segment(compressed.levels[0], compressed.rows[0]),
            coded_segment(compressed.levels[1], compressed.rows[1]),
        ]
        if isinstance(q, int):
            index, map_code = q, None
        else:
            index, map_code, map_segment = encode_quality_map(q, tier.coder)
            segments.insert(0, map_segment)
        string, lanes_log2 = tier.coder.encode(segments)
        size = compressed.width, compressed.height
        return pack(Bitstream(self.model_id, *size, index, lanes_log2, compressed.tier, map_code, string))

    def decompress(self, strings: Sequence[bytes], executor: Executor | None = None) -> list[DecompressedImage]:
        """Entropy decoding and the integer network, in batches of one latent size. Errors as ``decode``."""
        opened = [self._open(s) for s in strings]
        keys = [self._group(*latent_size(o.height, o.width), o.quality_index, o.tier) for o in opened]
        return in_groups(keys, self._group_size, lambda at: self._decompress_group([opened[i] for i in at], executor))

    def reconstruct(self, images: Sequence[DecompressedImage]) -> list[RGBImage]:
        """The device stage of decoding: the synthesis, in batches of one latent size."""
        keys = [self._group(i.y_fixed.shape[2], i.y_fixed.shape[3], i.quality_index, i.tier) for i in images]
        return in_groups(keys, self._group_size, lambda at: self._reconstruct_group([images[i] for i in at]))

    @torch.inference_mode()
    def latents(self, images: Sequence[DecompressedImage]) -> list[Tensor]:
        """``y_hat`` of each image on this codec's device, float32 (M, h, w): what an adapter takes."""
        latents = []
        for image in images:
            model = self.tiers[image.tier].model(image.quality_index)
            y_hat = model.y_hat(image.y_fixed[None], self._q([image.quality_index]))[0]
            latents.append(F.pad(y_hat, (0, 0, 0, 0, 0, self.config.M - len(y_hat))))
        return latents

    def _tier_of(self, quality: QualityIndex) -> int:
        """The tier of a new image: the first, and so the most special, whose range covers it."""
        return next(k for k, tier in enumerate(self.tiers) if tier.covers(quality))

    def _group(self, height: int, width: int, quality: QualityIndex, tier: int) -> Group:
        """What images on a latent grid of ``height`` x ``width`` share that are computed together."""
        return height, width, isinstance(quality, int), tier, self.tiers[tier].num_channels(quality)

    def _group_size(self, height: int, width: int, *_: object) -> int:
        """How many latents of one size make a batch."""
        # On a CPU, batching gains nothing, and one image at a time computes the same sums whatever the batch.
        return 1 if self.device.type == "cpu" else max(1, _MAX_BATCH_POSITIONS // (height * width))

    def _compress_group(self, images: list[RGBImage], quality: list[QualityIndex]) -> list[CompressedImage]:
        tier = self._tier_of(quality[0])
        x = to_device(images, self.device)
        with turn_on(self.device):
            latents = self.tiers[tier].model(quality[0]).compress(x, self._q(quality))
            z, levels, rows = (to_host(t.contiguous()) for t in latents)
        return [
            CompressedImage(image.shape[1], image.shape[0], quality[k], tier, z[k], levels[k], rows[k])
            for k, image in enumerate(images)
        ]

    def _decompress_group(
        self, opened: list[_Opened], executor: Executor | None, bits: Tensor | None = None
    ) -> list[DecompressedImage]:
        """One batch of ``decompress``; adds the bits of all its elements of y to ``bits`` (h, w)."""
        h, w = latent_size(opened[0].height, opened[0].width)
        quality, decoders = [o.quality_index for o in opened], [o.decoder for o in opened]
        q, tier = self._q(quality), self.tiers[opened[0].tier]
        model = tier.model(quality[0])
        try:
            z = np.stack([tier.decode_z(d, k, h, w) for d, k in zip(decoders, quality, strict=True)])
            with turn_on(self.device):
                z_hat = torch.from_numpy(z).to(self.device).float()
                hyper, first = model.decompress_first(z_hat, q, h, w)
                levels_first = self._decode_half(decoders, first.indexes, executor)
                y_first = model.y_fixed(levels_first, first)
                second = model.decompress_second(hyper, y_first, q)
                levels_second = self._decode_half(decoders, second.indexes, executor)
                y_second = model.y_fixed(levels_second, second)
            for decoder in decoders:
                decoder.finish()
        except RansError as error:
            raise BitstreamError(f"bitstream cannot be decoded: {error}") from None
        if bits is not None:
            for levels, params in ((levels_first, first), (levels_second, second)):
                bits += model.estimated_bits(levels, params)[0].cpu()
        # Channels last in memory, as the synthesis takes them.
        y_fixed = torch.stack([y.permute(0, 2, 3, 1) for y in (y_first, y_second)], dim=1).permute(0, 1, 4, 2, 3)
        return [
            DecompressedImage(o.width, o.height, o.quality_index, o.tier, y)
            for o, y in zip(opened, y_fixed, strict=True)
        ]  # fmt: skip

    def _decode_half(self, decoders: list[RansDecoder], indexes: Tensor, executor: Executor | None) -> Tensor:
        rows = as_coded(indexes, torch.uint8)

        def decode(k: int) -> NDArray[np.int32]:
            return decode_levels(decoders[k], rows[k])

        with give_way():
            halves = _map(executor, decode, range(len(decoders)))
            levels = np.stack(halves) if len(halves) > 1 else halves[0][None]
        return torch.from_numpy(levels).to(self.device).permute(0, 3, 1, 2)

    def _reconstruct_group(self, images: list[DecompressedImage]) -> list[RGBImage]:
        y_fixed = torch.stack([i.y_fixed for i in images]) if len(images) > 1 else images[0].y_fixed[None]
        model = self.tiers[images[0].tier].model(images[0].quality_index)
        with turn_on(self.device):
            x_hat = model.reconstruct(y_fixed, self._q([i.quality_index for i in images]))
            pixels = to_host(x_hat.permute(0, 2, 3, 1))
        return [np.ascontiguousarray(p[: i.height, : i.width]) for p, i in zip(pixels, images, strict=True)]

    def _open(self, data: bytes) -> _Opened:
        stream = unpack(data, self.max_pixels)
        if stream.model_id != self.model_id:
            raise ModelMismatchError(
                f"bitstream was written by model {stream.model_id.hex()}, this codec is model {self.model_id.hex()}"
            )
        num_q = self.config.num_q
        quality: QualityIndex = stream.quality_index
        if quality >= num_q:
            raise BitstreamError(f"bitstream has quality index {quality}, the model has {num_q}")
        if stream.tier >= len(self.tiers):
            raise BitstreamError(f"bitstream has tier {stream.tier}, the model has {len(self.tiers)}")
        try:
            decoder = self.tiers[stream.tier].coder.decoder(stream.string, stream.lanes_log2)
            if stream.map_code is not None:
                size = latent_size(stream.height, stream.width)
                quality = decode_quality_map(stream.quality_index, stream.map_code, decoder, *size, num_q)
        except RansError as error:
            raise BitstreamError(f"bitstream cannot be decoded: {error}") from None
        if not self.tiers[stream.tier].covers(quality):
            raise BitstreamError(f"bitstream has a quality that its tier, {stream.tier}, is not for")
        return _Opened(stream.width, stream.height, quality, stream.tier, decoder)

    def _q(self, quality: list[QualityIndex]) -> Tensor:
        """Quality index maps of a group as float32: (B, 1, 1, 1) for uniform ones, else (B, 1, h, w)."""
        maps = [np.full((1, 1), q) if isinstance(q, int) else q for q in quality]
        return torch.from_numpy(np.stack(maps).astype(np.float32))[:, None].to(self.device)


def _map(executor: Executor | None, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    return list(executor.map(function, items) if executor is not None else map(function, items))
