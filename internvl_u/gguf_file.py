"""A part of the model in a GGUF file as `convert` writes it: its matrices stay packed, and mapped from disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from .checkpoint import SingleFile
from .dequantize import FORMATS, PackedMatrix
from .files import FileState, check_unchanged, in_short, state_of
from .gguf_header import ARCHITECTURE, DESCRIPTION, Header, read_header
from .schema import Description
from .weights import SMALL, OpenFile, Weights

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class GGUF(SingleFile):
    """A part in a GGUF file of its own."""

    key = DESCRIPTION

    @cached_property
    def header(self) -> Header:
        """What the file says of itself.

        Raises:
            RuntimeError: it is no GGUF file, not whole, or of another model or converter.
        """
        found = read_header(self.path)
        if found.architecture != ARCHITECTURE:
            what = f"a GGUF file of {found.architecture[:100]!r}" if found.architecture else "a GGUF file of no model"
            raise RuntimeError(
                f"{self.path} is {what}, {ARCHITECTURE!r} expected: it is another model, or one that another converter "
                "has written. `python -m internvl_u convert` writes those that load here."
            )
        if found.description is None:
            raise RuntimeError(
                f"{self.path} is a GGUF file without {DESCRIPTION}: another converter has written it. "
                "`python -m internvl_u convert` writes what loads here, from the released folder."
            )
        return found

    def metadata(self, part: str) -> Mapping[str, str]:
        return {}  # scales stand in the blocks

    @cached_property
    def description(self) -> Description:
        return self._described(self.header.description or "")

    @property
    def packed(self) -> Mapping[str, PackedMatrix]:
        return {
            name: PackedMatrix(one.form, one.shape) for name, one in self.header.tensors.items() if one.form in FORMATS
        }

    def weights(self, part: str, open_file: OpenFile) -> tuple[Weights, tuple[FileState, ...]]:
        tensors = self.header.tensors
        unknown = [f"{name}: {one.form}" for name, one in tensors.items() if one.form not in (*_DTYPES, *FORMATS)]
        if unknown:
            raise RuntimeError(
                f"{self.path}: {len(unknown)} of {len(tensors)} tensors are of a dtype that is not read "
                f"({', '.join(unknown[:5])}), one of {', '.join((*FORMATS, *_DTYPES))} expected"
            )
        try:
            before = state_of(self.path)
            small = before.size <= SMALL
            data = torch.from_file(str(self.path), shared=False, size=before.size, dtype=torch.uint8)
            data = data.clone() if small else data
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{self.path} cannot be mapped ({in_short(error)})") from error
        if any(one.start + one.size > before.size for one in tensors.values()):
            raise RuntimeError(f"{self.path} has become shorter since its header was read. Run again when it is whole.")
        weights: Weights = {}
        for name, one in tensors.items():
            stored = data[one.start : one.start + one.size]
            if one.form in _DTYPES:
                weights[name] = stored.view(_DTYPES[one.form]).reshape(one.shape)
            else:
                weights[name] = stored.reshape(PackedMatrix(one.form, one.shape).stored_shape)
        if small:
            check_unchanged([before])
        return weights, () if small else (before,)

    def summary(self) -> str:
        """Returns how many tensors are of which dtype, such as "168 Q4_K, 30 BF16"."""
        counts = Counter(one.form for one in self.header.tensors.values())
        return ", ".join(f"{count} {form}" for form, count in counts.most_common())
