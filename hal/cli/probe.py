# SPDX-License-Identifier: Apache-2.0
"""`hal probe`: how a device multiplies, measured from outside; and whole products predicted on another device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hal.cli.output import plain, say, stdout_for_results
from hal.errors import ConfigError

if TYPE_CHECKING:
    from hal.probe.facts import UnitFacts
    from hal.probe.kernels import Kernels
    from hal.probe.prediction import Agreement, Products
    from hal.probe.report import DeviceFacts


@click.command(short_help="Measure how a device multiplies: order, bits, rounding.")
@click.argument("device", required=False)
@click.option("--predict", metavar="S", help="A device, or a file of --record, whose products predict the others.")
@click.option("--against", metavar="D", help="A device, or a file of --record, that is predicted.")
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), metavar="F",
              help="Write DEVICE's products to a file, for --predict or --against elsewhere.")  # fmt: skip
@click.option("--format", "formats", multiple=True, metavar="T",
              help="Operands of the products: bfloat16, float8_e4m3fn, ... Default: all of 16 and 8 bits.")  # fmt: skip
@click.option("--inner", type=click.IntRange(8, 4096), default=64, show_default=True, metavar="K",
              help="Inner length of the products that are probed; of 8 bits, the next multiple of 16.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def probe(
    ctx: click.Context, device: str | None, predict: str | None, against: str | None, record: Path | None,
    formats: tuple[str, ...], inner: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure how DEVICE multiplies matrices, and name the known matrix unit that it is most like.

    \b
    hal probe cuda:0                              its arithmetic, format by format
    hal probe cuda:0 --record h200.safetensors    its products, to be compared elsewhere
    hal probe --predict sim:h200 --against cuda:0 (or a recording)
                                                  how many of them the simulated unit has bit by bit

    Exit status 1 if the device does less than its backend's contract declares, or something else than its
    architecture is known to do.
    """
    if (predict is None) != (against is None) or (device is None) == (predict is None):
        raise click.UsageError("give DEVICE, or both --predict and --against")
    if record is not None and device is None:
        raise click.UsageError("--record writes the products of DEVICE")
    if formats and record is None and predict is None:
        raise click.UsageError("--format is for --record and --predict; a probe takes all formats")
    _known(formats)
    if predict is not None and against is not None:
        with stdout_for_results():
            pair = (_products(predict, formats), _products(against, formats))
        _print_agreement(*pair, as_json=as_json)
        return
    assert device is not None
    if record is not None:
        from hal.probe import prediction, recording

        with stdout_for_results():
            products = prediction.computed(device, formats)
            recording.write(products, record)
        say(f"{len(products.results)} products of {device} written to {record}")
        _tell_refused(products)
        return
    from hal.probe import report

    with stdout_for_results():
        facts = report.probe(device, inner)
    if as_json:
        click.echo(json.dumps(facts.as_json(), indent=2))
    else:
        _print_facts(facts)
    ctx.exit(1 if facts.contradictions else 0)


def _known(formats: tuple[str, ...]) -> None:
    from hal.matrix_unit import FORMATS

    for format in formats:
        if format not in FORMATS or format in ("tf32", "hf32"):
            names = ", ".join(name for name in FORMATS if name not in ("tf32", "hf32"))
            raise ConfigError(f"no format {format!r}", expected=names)


def _products(source: str, formats: tuple[str, ...]) -> Products:
    from hal.probe import prediction, recording

    return recording.read(Path(source)) if Path(source).is_file() else prediction.computed(source, formats)


# Tables --------------------------------------------------------------------------------------------------------------


def _print_facts(facts: DeviceFacts) -> None:
    say: Callable[[str], None] = click.echo
    say(
        plain(
            f"{facts.device['id']}  {facts.device['name'] or facts.device['vendor']}  fingerprint {facts.fingerprint}"
        )
    )
    say("")
    rows = [("FORMAT", "OPERANDS", "AT ONCE", "ALIGNED", "SUM", "SUBNORMALS", "OVERFLOW", "INF, NAN, -0"),
            *(_row(unit) for unit in facts.units.values())]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    say("\norder of additions (K = the inner length that was probed)")
    for name, unit in facts.units.items():
        say(f"  {name.ljust(16)} K = {unit.inner}: {unit.order}")
        for K, why in unit.longer.items():
            if why.startswith("no tree"):
                say(f"  {''.ljust(16)} K = {K}: {plain(why)}")
    say("\nthe same bits in other shapes, and from run to run")
    for name, found in facts.kernels.items():
        say(f"  {name.ljust(16)} {_kernels(found)}")
        for where, order in facts.orders.get(name, {}).items():
            say(f"  {''.ljust(16)} {where}: {order}")
    say(f"\ntop-k takes {_TIES[facts.topk_ties]} of equal numbers")
    for name, reason in facts.refused.items():
        say(f"not multiplied: {name}: {plain(reason)[:120]}")
    say("")
    say(_nearest(facts))
    for sentence in facts.contradictions or ("nothing contradicts the declared contract",):
        say(sentence)


_TIES = {"lower index": "the lower index", "higher index": "the higher index", "neither": "no fixed one"}


def _row(unit: UnitFacts) -> tuple[str, ...]:
    sums = f"{unit.accumulator_bits}{' or more' if unit.accumulator_at_least else ''} bits, {unit.sums or '?'}"
    small = ", small ones down" if unit.small_sum == "rounded down" else ""
    small += f", stored {unit.stored}" if unit.stored not in (None, "nearest, ties to even") else ""
    aligned = "-" if unit.alignment_bits is None else f"{unit.alignment_bits} bits, {unit.aligned}"
    aligned += ", normalised" if unit.exponents == "normalised" else ""
    if unit.products_under_sum not in (None, unit.alignment_bits):
        aligned += f"; {unit.products_under_sum} under a larger sum, {unit.rest_under_sum or '?'}"
    subnormals = {("kept", "kept"): "kept", ("kept", None): "kept"}.get(
        (unit.subnormal_inputs or "", unit.subnormal_results),
        f"{unit.subnormal_inputs} in, {unit.subnormal_results or '-'} out",
    )
    return (
        unit.name,
        f"{unit.input_bits} bits{f', {unit.input_rounding}' if unit.input_rounding else ''}",
        "-" if unit.group is None else str(unit.group),
        aligned,
        "?" if unit.accumulator_bits is None else sums + small,
        subnormals,
        _overflow(unit),
        _lost(unit),
    )


def _overflow(unit: UnitFacts) -> str:
    """Return what becomes of products that are beyond the range; of a sum as well, if that is no infinity."""
    from hal.probe.special import named

    of_sums = unit.overflow_stored
    if of_sums in (None, "infinity"):
        return unit.overflow or of_sums or "-"
    return ", ".join((*([unit.overflow] if unit.overflow else []), f"sums to {named(of_sums)}"))


def _lost(unit: UnitFacts) -> str:
    """Return "kept", or what becomes of infinity, of NaN, and of the sign of zero."""
    from hal.probe.special import named

    found = (("infinity to", unit.infinity), ("NaN to", unit.nan), ("zeros", unit.zero_signs))
    return ", ".join(f"{what} {named(answer)}" for what, answer in found if answer not in (None, "kept")) or "kept"


def _kernels(found: Kernels) -> str:
    words = ["runs alike" if found.deterministic else "RUNS DIFFER"]
    batches = ", ".join(map(str, found.differing_batches))
    words.append(f"other bits in batches of {batches} rows" if batches else "batches alike")
    for name, answer in (("1 row", found.single_row), ("1 column", found.single_column), ("a vector", found.vector)):
        if answer != "same":
            words.append(f"{name}: {'other bits' if answer == 'other' else plain(answer)}")
    return "; ".join(words)


def _nearest(facts: DeviceFacts) -> str:
    from hal.probe.multiplier import OUTER

    likeness = facts.likeness
    names = ", ".join(likeness.archs)
    lengths = sorted({K for found in facts.products.values() for K, _ in found.results})
    shapes = f"{OUTER} rows and columns, K = {', '.join(map(str, lengths))}"
    compared = f"{likeness.elements} elements of whole products ({shapes})"
    differ = ", ".join(f"{count} of {of} in {name}" for name, (count, of) in likeness.whole.items())
    if likeness.exact:
        return f"all of this is the known arithmetic of {names}{_schedules(facts)}; so are {compared}, bit by bit"
    if not likeness.differences:
        names += _schedules(facts)
        return f"no known arithmetic: all answers are those of {names}, but of {compared} some differ: {differ}"
    what = "; ".join(f"{name}: {', '.join(of)}" for name, of in likeness.differences.items())
    differ = f"; of {compared} some differ: {differ}" if differ else ""
    return f"no known arithmetic; nearest is {names}, which differs in {what}{_schedules(facts)}{differ}"


def _schedules(facts: DeviceFacts) -> str:
    """Return in words how K is shared out, once if all formats are alike."""
    found = facts.likeness.schedules
    formats = {words: [name for name, of in found.items() if of == words] for words in found.values()}
    if len(formats) == 1 and len(found) == len(facts.units):
        return f", with {next(iter(formats))}"
    return "".join(f"; with {words} in {', '.join(names)}" for words, names in formats.items())


def _print_agreement(one: Products, other: Products, *, as_json: bool) -> None:
    from hal.probe.prediction import compare

    found = compare(one, other)
    if as_json:
        sides = {name: _side(each) for name, each in (("predicted", one), ("against", other))}
        report = {"schema": "hal.prediction/1", **sides, "agreement": [each.as_json() for each in found]}
        click.echo(json.dumps(report, indent=2))
    elif not found:
        click.echo("no product that both have")
    else:
        _print_classes(one, other, found)
    for each in (one, other):
        _tell_refused(each)


def _side(products: Products) -> dict[str, object]:
    return {"source": products.source, "device": dict(products.device), "versions": dict(products.versions),
            "refused": dict(products.refused)}  # fmt: skip


def _print_classes(one: Products, other: Products, found: list[Agreement]) -> None:
    name = other.device.get("name") or other.device.get("id") or "unknown"
    click.echo(plain(f"{one.source} predicts {other.source} ({name})") + "\n")
    rows = [("FORMAT", "SHAPES", "ALL BITS EQUAL", "ELEMENTS EQUAL", "DIFFER MOST")]
    for each in found:
        worst = sorted(each.differing.items(), key=lambda item: item[1])[:3]
        rows.append((
            each.format, each.kind, f"{each.equal_shapes} of {each.shapes}", f"{each.share:.4%}",
            ", ".join(f"{name} ({share:.2%})" for name, share in worst) or "-",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _tell_refused(products: Products) -> None:
    """Say what was refused, once for each format and reason."""
    alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, reason in products.refused.items():
        format, _, shape = name.partition("/")
        # A reason may quote the shape.
        alike.setdefault((format, re.sub(r"\d+", "", reason)), []).append((shape, reason))
    for (format, _), found in alike.items():
        shape, reason = found[0]
        if len(found) > 1:
            shape = f"{len(found)} products, such as {shape}"
        say(f"{products.source}: no {format}{f' ({shape})' if shape else ''}: {plain(reason)[:160]}")
