"""Maps averaged over windows: the values and gradients of adaptive_avg_pool2d."""

from __future__ import annotations

import pytest
import torch

from ekd_lightning.networks.staged import average_pool


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sides", [(8, 8, 4, 4), (16, 8, 2, 8), (6, 6, 4, 4), (7, 9, 1, 3), (2, 2, 4, 4)])
def test_averages_and_gradients_are_those_of_adaptive_avg_pool2d(sides, layout):
    height, width, *size = sides
    maps = torch.rand(3, 5, height, width).to(memory_format=layout).requires_grad_()
    ours, theirs = average_pool(maps, tuple(size)), torch.nn.functional.adaptive_avg_pool2d(maps, size)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    weights = torch.rand_like(theirs)
    ours, theirs = (torch.autograd.grad(pooled, maps, weights)[0] for pooled in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_equal_windows_do_not_need_the_backward_pass_without_a_deterministic_form(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "adaptive_avg_pool2d")
    assert average_pool(torch.ones(1, 1, 8, 4), (4, 2)).shape == (1, 1, 4, 2)
