"""What a build tells at its end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sonoedge.bundle import Manifest
from sonoedge.export.fidelity.result import Fidelity
from sonoedge.export.quantizing import Tuning


class Built(msgspec.Struct, frozen=True):
    """What a build measured on the way; None where the model was too large to run here."""

    manifest: Manifest
    quantized_share: float
    golden_error: float | None
    calibration_error: dict[str, float]
    tensors_kept: int  # taken over from a halted build
    fidelity_missed: tuple[str, ...] | None = None  # floors; None: not measured, or the recipe has none
    tuning: Tuning | None = None  # None: the recipe asks for none, or the search held its floor
    preset: Fidelity | None = None  # what a preset costs; None: all experts are there
    unsigned_because: str | None = None  # None: the account's own key has signed it


class PresetCost(msgspec.Struct, frozen=True):
    """What one comparison of a preset gave; None: not measured."""

    kl: float  # mean, nats
    top1: float
    answers: float | None
    answers_tossups_aside: float | None


def _costs(fidelity: Fidelity) -> dict[str, PresetCost]:
    """Each comparison by its name."""
    return {
        name: PresetCost(
            found.divergence.mean,
            found.divergence.top1,
            None if found.answers is None else found.answers["overall"],
            None if found.tossups_aside is None else found.tossups_aside["overall"],
        )
        for name, found in fidelity.variants.items()
    }


def _preset(fidelity: Fidelity) -> dict[str, object]:
    """What a preset did, for the JSON line."""
    pinned = fidelity.preset
    assert pinned is not None  # the build put it there
    return {
        "region": pinned.region,
        "method": pinned.method,
        "kept": {layer.mixture: layer.kept for layer in pinned.layers},
        "mass_kept": {layer.mixture: layer.mass_kept for layer in pinned.layers},
        "weights_bytes_before": pinned.weights_bytes_before,
        "weights_bytes_after": pinned.weights_bytes_after,
        "routing": pinned.verdict,
        "costs": _costs(fidelity),
        "missed": fidelity.missed,
    }


def _tell_preset(fidelity: Fidelity) -> None:
    pinned = fidelity.preset
    assert pinned is not None  # the build put it there
    saved = pinned.weights_bytes_before - pinned.weights_bytes_after
    print(
        f"{pinned.experts} for {pinned.region} ({pinned.method}): {saved:,} of {pinned.weights_bytes_before:,} bytes "
        f"of weights saved, at least {pinned.least_mass_kept:.1%} of the routing mass kept in a layer"
    )
    print(pinned.verdict)
    for name, cost in _costs(fidelity).items():
        answers = "" if cost.answers is None else f", answers equal {cost.answers:.1%}"
        aside = "" if cost.answers_tossups_aside is None else f" ({cost.answers_tossups_aside:.1%} toss-ups aside)"
        print(f"  {name}: KL {cost.kl:.3g}, top-1 {cost.top1:.1%}{answers}{aside}")


def report(out: Path, built: Built, as_json: bool) -> None:
    """Say what was built."""
    manifest = built.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    if as_json:
        told = {
            "bundle": str(out),
            "model": manifest.model.id,
            "bytes": size,
            "quantized_share": built.quantized_share,
            "golden_error": built.golden_error,
            "golden_bound": manifest.golden.bound,
            "calibration_error": built.calibration_error,
            "tensors_kept": built.tensors_kept,
            "fidelity_missed": built.fidelity_missed,
            "tuning": built.tuning,
            "preset": None if built.preset is None else _preset(built.preset),
            "unsigned_because": built.unsigned_because,
        }
        print(msgspec.json.encode(told).decode())
        return
    print(f"{out}: {size / 1e6:.1f} MB, model {manifest.model.id[:12]}, profile {manifest.profile}")
    if built.tensors_kept:
        print(f"{built.tensors_kept} tensors taken over from a halted build")
    error = built.golden_error
    off = (
        "the graphs were too large to run here"
        if error is None
        else f"logits differ from the float model's by {error:.1%}"
    )
    print(f"{built.quantized_share:.0%} of the products in int8; {off}")
    if built.tuning is not None:
        kept = "kept" if built.tuning.helped else "not kept"
        print(f"tuning: KL to float {built.tuning.before.kl:.3g}, after it {built.tuning.after.kl:.3g}, {kept}")
    if built.fidelity_missed is not None:
        held = "; ".join(built.fidelity_missed) if built.fidelity_missed else "all floors held"
        print(f"fidelity: {held}; see {out / 'reports' / 'fidelity.html'}")
    if built.preset is not None:
        _tell_preset(built.preset)
        print(f"see {out / 'reports' / 'preset.html'}")
    for hint, calibration in manifest.hint_calibration.items():
        print(
            f"  {hint}: temperature {calibration.temperature:.2f}, silent below {calibration.abstain_below:.2f}, "
            f"calibration error {built.calibration_error[hint]:.3f}"
        )
    if built.unsigned_because is None:
        print("signed for this account: `serve` takes it here; sign it with a key of your own before it is shipped")
    else:
        print(f"not signed: {built.unsigned_because}")
