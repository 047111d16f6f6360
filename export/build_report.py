"""What a build tells at its end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sonoedge.bundle import Manifest
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
    for hint, calibration in manifest.hint_calibration.items():
        print(
            f"  {hint}: temperature {calibration.temperature:.2f}, silent below {calibration.abstain_below:.2f}, "
            f"calibration error {built.calibration_error[hint]:.3f}"
        )
