"""Native code for a model's steps, made before a command that writes for long: said, waited for, never in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compile_steps(network: Any, say: Callable[[str], None]) -> None:
    """Make the native code that `network` would use and that is not kept yet; without it the network is slower, no more."""
    from formary.infer import compiled, fused, fused_encoder

    if fused.fits(network):
        parts = fused.parts_of(network).all
    else:
        parts = list(fused_encoder.parts_of(network)) if fused_encoder.fits(network) else []
    if not parts or not compiled.missing(*parts):
        return
    say(
        "compiling:  the steps between products, once for models of this shape (about a minute; --no-compile leaves it out)"
    )
    try:
        compiled.build(*parts)
    except compiled.NotCompiled as error:
        say(f"compiling:  not done, so it runs slower: {error}")
