"""Every wrong argument of fused_logps is named, as those of the losses are (test_errors.py)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastdpop import fused_logps
from tests.api.test_errors import META, H, S, T, V, good, labels


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            "reduction is 'mean', expected one of ('sequence', 'token')",
            {"reduction": "mean"},
        ),
        (
            ValueError,
            "token_weights has shape (4,), expected (4, 6): one weight per label",
            {"token_weights": torch.ones(S)},
        ),
        (TypeError, "token_weights is list, expected a torch.Tensor", {"token_weights": [1.0]}),
        (
            ValueError,
            "token_weights has dtype torch.bfloat16, in which it is rounded",
            {"token_weights": torch.ones(S, T).bfloat16()},
        ),
        (ValueError, "token_weights is on meta", {"token_weights": torch.ones(S, T, device=META)}),
        (
            ValueError,
            "expected neither with 'token'",
            {"reduction": "token", "token_weights": torch.ones(S, T)},
        ),
        (ValueError, "expected neither with 'token'", {"reduction": "token", "ld_alpha": 0.5}),
        (ValueError, "ld_alpha is 1.5, expected a value in [0, 1]", {"ld_alpha": 1.5}),
        (ValueError, "ld_alpha is nan", {"ld_alpha": float("nan")}),
        (ValueError, "ld_alpha is '0.5'", {"ld_alpha": "0.5"}),
        (TypeError, "shift_labels is 0, expected True or False", {"shift_labels": 0}),
        (ValueError, "labels contain 11, expected token ids", {"labels": labels(V)}),
        (
            ValueError,
            "ld_alpha compares sequences i and i + S / 2, expected an even number",
            {
                "ld_alpha": 0.5,
                "hidden": torch.randn(3, T, H),
                "labels": torch.ones(3, T, dtype=torch.int64),
            },
        ),
    ],
)
def test_fused_logps_names_its_arguments(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    arguments = {**good(), **options}
    del arguments["ref_logps"]
    with pytest.raises(error, match=re.escape(message)):
        fused_logps(**arguments)
