"""Wrappers of torch around a model are refused by name."""

from __future__ import annotations

import pytest
from tiny import make_batch, tiny
from torch import nn

import tezo_ds


@pytest.mark.parametrize(
    "name", ["DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"]
)
def test_a_wrapped_model_is_refused(name: str) -> None:
    wrapper = type(name, (nn.Module,), {})()
    wrapper.module = tiny()
    for model in (wrapper, nn.Sequential(wrapper)):
        with pytest.raises(tezo_ds.ConfigError, match=f"wrapped in {name}; unwrap it"):
            tezo_ds.initialize(model, {"rank": 2})
    assert tezo_ds.initialize(wrapper.module, {"rank": 2}).loss(make_batch(2)) > 0
    assert tezo_ds.initialize(nn.DataParallel(tiny()).module, {"rank": 2}).loss(make_batch(2)) > 0


def test_torchs_own_wrapper_is_refused() -> None:
    with pytest.raises(tezo_ds.ConfigError, match="wrapped in DataParallel; unwrap it"):
        tezo_ds.initialize(nn.DataParallel(tiny()), {"rank": 2})
