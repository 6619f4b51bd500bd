# SPDX-License-Identifier: Apache-2.0
"""One layer of the trained model, as an input: its router, its experts, and the activations that reach it.

What training makes of a router, random numbers do not show: its margins, the load of its experts, activations that
share directions, channels that stand out. `python -m hal_conformance.language.trained FILE` trains the model anew and
writes the file that ships with the package; on another machine its bits differ in the last places, so the file, not the
training, is what every host reads.

Legend: T tokens, D model dim, E experts, F their hidden dim, S of the shared experts.
"""

from __future__ import annotations

import functools
import sys
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from hal_conformance.case import Array, Arrays
from hal_conformance.language import parameters as named
from hal_conformance.language.spec import LanguageSpec, ling

FILE = "trained.safetensors"
STEPS = 3000
LAYER = 1
TOKENS = 1024
X = "x_TD"


@functools.cache
def layer() -> MappingProxyType[str, Array]:
    """Return `x_TD` [1024, 64] and the layer's weights by name, float32, read-only."""
    from safetensors.numpy import load

    found = load(files("hal_conformance.language").joinpath(FILE).read_bytes())
    for array in found.values():
        array.flags.writeable = False
    return MappingProxyType(found)


def model() -> LanguageSpec:
    """Return the model that the layer is of."""
    return ling()


def train(steps: int = STEPS, seed: int = 0) -> tuple[Arrays, float]:
    """Return the layer after training in float32 on this machine's CPU, and the last step's cross-entropy."""
    import torch

    from hal_conformance.language.text import batch
    from hal_conformance.language.training import Recipe, begin, run
    from hal_conformance.portable import portable

    recipe = Recipe()
    start = {name: torch.from_numpy(array) for name, array in named.initial(model(), seed).items()}
    training = begin(portable, model(), start, recipe, torch.float32)
    entropy = 0.0
    for number, done in enumerate(run(training, recipe, seed, steps), 1):
        entropy = done.losses.entropy.item()
        if number % 100 == 0:
            print(f"step {number}: {entropy:.3f}", file=sys.stderr)  # noqa: T201
    kept: list[torch.Tensor] = []

    def tap(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == named.of(LAYER, "mlp_normed"):
            kept.append(tensor.detach())
        return tensor

    while sum(map(len, kept)) < TOKENS:  # batches that it did not learn from
        tokens, targets = batch(seed, steps + 1 + len(kept), recipe.sequences, recipe.length)
        training.gradients(torch.from_numpy(tokens), torch.from_numpy(targets), tap)
    weights = dict(zip(training.names, training.parameters, strict=True))
    found = {X: torch.cat(kept)[:TOKENS].numpy()}
    for name in (named.GATE, *named.ROUTED, *named.SHARED):
        found[name] = weights[named.of(LAYER, name)].numpy()
    return found, entropy


def main() -> None:
    """Write the file."""
    from safetensors.numpy import save_file

    found, entropy = train()
    source = f"{model().name}, {STEPS} steps, block {LAYER}, cross-entropy {entropy:.3f}"
    save_file(found, Path(sys.argv[1]), metadata={"source": source})


if __name__ == "__main__":
    main()
