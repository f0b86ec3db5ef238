"""How far an adapter's vectors are from ones, by layer and kind: `moved`."""

from __future__ import annotations

import re
from collections import defaultdict

from ia3.adapter.adapted import Adapted
from ia3.adapter.architectures import kind_of

FEEDFORWARD = "feed-forward"


def moved(model: Adapted, adapter: str) -> dict[str, dict[int, float]]:
    """The mean of |l - 1| over an adapter's numbers: kind → layer, counted from 0 → mean.

    Kinds are "key", "value", "key and value" for what is fused, "feed-forward", or the name of another module, before these
    "encoder" or "decoder" in a model that has both. Modules outside numbered layers are layer 0.
    """
    both = all(any(part in path.split(".") for path in model.ia3_layers) for part in ("encoder", "decoder"))
    found: dict[str, dict[int, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for path, layer in model.ia3_layers.items():
        if adapter not in layer.held:
            continue
        vector = layer.held[adapter]
        kind = FEEDFORWARD if vector.feedforward else kind_of(path)
        if both:
            kind = f"{'encoder' if 'encoder' in path.split('.') else 'decoder'} {kind}"
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
        change = vector.effective().detach().float() - 1
        counted = change if vector.mask is None else change.flatten()[vector.mask.flatten().to(change.device)]
        found[kind][int(numbers[0]) if numbers else 0].append((counted.abs().sum().item(), counted.numel()))
    return {
        kind: {number: sum(s for s, _ in its) / sum(n for _, n in its) for number, its in sorted(layers.items())}
        for kind, layers in sorted(found.items())
    }
