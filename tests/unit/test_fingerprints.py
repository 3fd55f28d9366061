"""Checksums of values, by which ranks tell whether they have the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphshard.fingerprints import checksum_of, combined

VALUES: dict[str, Tensor] = {
    "no dims": torch.tensor(1.5),
    "no elements": torch.empty(0, 3),
    "bfloat16": torch.arange(6.0).bfloat16(),
    "bool": torch.tensor([True, False]),
    "complex, conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negated": torch.tensor([1 + 2j]).conj().imag,
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "expanded": torch.ones(1).expand(4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_checksum_is_of_the_values_in_their_order(name: str) -> None:
    value = VALUES[name].detach()
    assert checksum_of(VALUES[name]) == checksum_of(value.clone(memory_format=torch.contiguous_format))
    if value.numel():
        changed = value.clone().reshape(-1)
        changed[-1] = ~changed[-1] if value.dtype is torch.bool else changed[-1] + 1
        assert checksum_of(changed) != checksum_of(value)


def test_names_count_too() -> None:
    assert combined({"a": 1, "b": 2}) != combined({"a": 2, "b": 1})
    assert combined({"a": 1}) == combined({"a": 1}) != combined({})
