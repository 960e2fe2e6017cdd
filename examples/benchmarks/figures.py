"""What is reported of a row that ran: pure arithmetic over shapes and seconds, and tables over results."""

import statistics
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import transformers

from hf_nanotron.monitor.flops import active_weights, flops_per_token, head_dims

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(config: Any) -> Shapes:
    """Shape of every parameter of the stock model of `config`; tied ones once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def matmul_weights(shapes: Shapes, config: Any) -> float:
    """Weights that multiply a token: those of the layers (of the experts it meets) and of the head."""
    text = config.get_text_config()
    layers = sum(active_weights(name, shape, text) for name, shape in shapes.items())
    return layers + text.vocab_size * text.hidden_size


def attention_flops(config: Any, sequence_length: float) -> float:
    """Forward and backward FLOPs of causal attention of one token, counted once."""
    text = config.get_text_config()
    return 3.0 * text.num_hidden_layers * text.num_attention_heads * sum(head_dims(text)) * sequence_length


def flops_formulas(shapes: Shapes, config: Any, sequence_length: float) -> dict[str, float]:
    """FLOPs per token by the three formulas in use.

    `causal`: matmul weights and causal attention counted once. `full_attention`: the same with attention counted
    as if it were not causal, `12 * layers * heads * head_dim * sequence` (Chowdhery et al. 2022, arXiv:2204.02311).
    `parameters`: six times the parameters, embeddings and all (Kaplan et al. 2020, arXiv:2001.08361, but for the
    embeddings), of experts those that a token meets.
    """
    causal = flops_per_token(shapes, config, sequence_length)
    text = config.get_text_config()
    met = 0.0
    for name, shape in shapes.items():
        active = active_weights(name, shape, text)
        met += active if 0 < active < prod(shape) else prod(shape)
    return {
        "causal": causal,
        "full_attention": causal + attention_flops(config, sequence_length),
        "parameters": 6.0 * met,
    }


def speed(
    seconds: Sequence[float], tokens_per_device: float, formulas: Mapping[str, float], peak: float | None
) -> dict[str, Any]:
    """Figures of the timed steps.

    Args:
        seconds: of each step.
        tokens_per_device: tokens of one step, divided by the devices.
        formulas: FLOPs per token, by name; the first is the one that counts.
        peak: FLOP/s of a device, if known.
    """
    speeds = [tokens_per_device / taken for taken in seconds]
    middle = statistics.median(speeds)
    main = next(iter(formulas.values()))
    return {
        "timed_steps": len(seconds),
        "step_ms": round(1e3 * statistics.median(seconds), 2),
        "step_ms_range": [round(1e3 * min(seconds), 2), round(1e3 * max(seconds), 2)],
        "tokens_per_second_per_device": round(middle),
        "spread": [round(min(speeds)), round(max(speeds))],
        "mean_tokens_per_second_per_device": round(tokens_per_device * len(seconds) / sum(seconds)),
        "tflops_per_device": round(main * middle / 1e12, 2),
        "mfu": None if peak is None else round(main * middle / peak, 4),
        **{
            f"mfu_{name}": None if peak is None else round(flops * middle / peak, 4)
            for name, flops in list(formulas.items())[1:]
        },
    }


def ratios(results: Sequence[Mapping[str, Any]], base: str) -> list[dict[str, Any]]:
    """Each result over the one named `base`: medians, and the range from worst over best to best over worst.

    Raises:
        ValueError: no row of that name, or it has no speed.
    """
    found = [result for result in results if result["name"] == base]
    if not found or "spread" not in found[0]:
        names = ", ".join(result["name"] for result in results if "spread" in result)
        raise ValueError(
            f"no row named {base!r} ran, so there is nothing to compare with; these did: {names or 'none'}."
        )
    speed_of, (low, high) = found[0]["tokens_per_second_per_device"], found[0]["spread"]
    table = []
    for result in results:
        line: dict[str, Any] = {"name": result["name"]}
        if "spread" in result:
            line["ratio"] = result["tokens_per_second_per_device"] / speed_of
            line["range"] = (result["spread"][0] / high, result["spread"][1] / low)
            if "peak_memory_gib" in result and found[0].get("peak_memory_gib"):
                line["memory"] = result["peak_memory_gib"] / found[0]["peak_memory_gib"]
        table.append(line)
    return table


def comparison(results: Sequence[Mapping[str, Any]], base: str) -> str:
    """The ratios as a Markdown table, beside the figures that they are made of."""
    lines = [
        f"| row | tokens/s | range | MFU | floor's MFU | peak memory, GiB | over {base} | range | memory over {base} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result, line in zip(results, ratios(results, base), strict=True):
        if "ratio" not in line:
            reason = "out of memory" if "out_of_memory" in result else result.get("error", "no figures")
            lines.append(f"| {result['name']} | {str(reason).replace('|', '/')[:80]} | | | | | | | |")
            continue
        low, high = result["spread"]
        floor = result.get("floor", {}).get("mfu")
        cells = [
            f"{result['tokens_per_second_per_device']:,}",
            f"{low:,} – {high:,}",
            percent(result["mfu"]),
            percent(floor),
            str(result.get("peak_memory_gib", "")),
            f"{line['ratio']:.3f}",
            f"{line['range'][0]:.3f} – {line['range'][1]:.3f}",
            f"{line['memory']:.3f}" if "memory" in line else "",
        ]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """`share`, or nothing where it is not known, as `mfu` on a CPU."""
    return "" if share is None else f"{share:.1%}"
