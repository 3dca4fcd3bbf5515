"""What ``exitkit export`` writes: of a run everything that it knows, of a folder of exits what the flags add."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exitkit.cli.data.text_files import load_tokenizer
from exitkit.cli.experiments import ask_for, import_heads
from exitkit.cli.sources import load_model
from exitkit.common.errors import ArgumentError, FileError, unknown_name
from exitkit.common.schema import read_json
from exitkit.methods.policy import ExitPolicy
from exitkit.multi_exit.model import MultiExitModel
from exitkit.multi_exit.preprocessing import Preprocessing, TextPreprocessing, preprocessing_from_json
from exitkit.multi_exit.saving.configuration import CONFIG, read_configuration
from exitkit.packages import export
from exitkit.packages.exporting import package_kind
from exitkit.report.decision import cheapest_promised
from exitkit.report.run import BACKBONE, INPUTS, Run, exits_folder, outputs_file, read_run
from exitkit.report.samples import CLASSES
from exitkit.retrofitting.result import EXITS, PREPROCESSING, RESULT

_AGAIN = "delete it, or run exitkit retrofit again"


@dataclass(frozen=True)
class Source:
    """Exits that can be exported, and what is known of them.

    Attributes:
        exits: their folder, or a name on the Hub.
        model, weights, num_classes: the backbone, as for ``exitkit bench``; None where nothing tells.
        policy: what ``exitkit calibrate`` chose, or None.
        classes: names of the classes, or None.
        preprocessing: of images, or None.
        max_length: of texts: tokens after which one is cut, or None for as many as the model takes.
        method: of the run, or None.
        why: why that one of the run's methods, where several could have been taken.
    """

    exits: str
    model: str | None = None
    weights: str | None = None
    num_classes: int | None = None
    policy: ExitPolicy | None = None
    classes: Sequence[str] | None = None
    preprocessing: Preprocessing | None = None
    max_length: int | None = None
    method: str | None = None
    why: str = ""


def find_source(place: str, method: str | None) -> Source:
    """The exits in ``place``: a run's folder, a folder of exits, or a name on the Hub.

    Args:
        place: as typed.
        method: of a run with several; by default the cheapest of those that something is promised for.

    Raises:
        ArgumentError: a run without exits, without such a method, or with several and no promise.
        FileError: a damaged file.
    """
    folder = Path(place)
    if (folder / CONFIG).is_file() or not folder.is_dir():
        return _with_what_is_beside(place)
    if not any(folder.glob("outputs-*.safetensors")):
        inside = sorted(path.parent for path in (*folder.glob(f"exits/*/{CONFIG}"), *folder.glob(f"*/{CONFIG}")))
        return _with_what_is_beside(str(_one(inside, folder)))
    run = read_run(folder, regression=True)
    name, why = _chosen(run, method)
    exits = exits_folder(folder, name)
    if not exits.is_dir():
        raise ArgumentError(
            f"RUN_DIR {place!r} holds no exits of {name!r}: there is no {str(exits)!r}. Run exitkit bench or train again, "
            "which keep them, or name another folder by --exits"
        )
    return replace(_known(run, name, str(exits)), why=why)


def flags_over(
    source: Source,
    model: str | None,
    weights: str | None,
    num_classes: int | None,
    max_length: int | None,
    labels: str | None,
    trust: bool,
) -> Source:
    """The source with what was typed in place of what was found.

    Raises:
        ArgumentError: nothing tells the model, or a run names a function as its model or head, and ``trust`` is not given.
    """
    if model is None and source.model is None:
        raise ArgumentError(
            f"--model is missing: {source.exits!r} does not say on which backbone its exits were trained"
        )
    if model is None and not trust:
        ask_for(str(source.model), "run")
    if (saved := Path(source.exits) / CONFIG).is_file():
        import_heads(read_configuration(saved).head, "run", trust)
    return replace(
        source,
        model=source.model if model is None else model,
        weights=source.weights if weights is None else weights,
        num_classes=source.num_classes if num_classes is None else num_classes,
        max_length=source.max_length if max_length is None else max_length,
        classes=source.classes if labels is None else read_labels(labels),
    )


def export_source(source: Source, out: Path, threshold: float | None, optimize: bool) -> list[str]:
    """Write the package; what was written, in lines.

    Raises:
        ArgumentError: there is no threshold, or what :func:`exitkit.export` raises.
    """
    package_kind(out, optimize, "--out ")
    verdict = _verdict(Path(source.exits).resolve())
    model = str(source.model)
    ee = MultiExitModel.from_pretrained(load_model(model, source.weights, source.num_classes).eval(), source.exits)
    if threshold is None and source.method is not None and source.policy is None:
        if ee.regression:
            raise ArgumentError(
                "--threshold is missing: of a regression no τ holds a promise. Give −a, such as -0.1, for samples to leave "
                "once predictions change by less than a; exitkit report writes the error at every τ to report-curve.csv"
            )
        raise ArgumentError(
            f"no threshold that was calibrated holds a promise for {source.method!r}; run exitkit calibrate on the run (with "
            "a larger --max-drop where nothing was found), or give --threshold"
        )
    export(
        ee,
        out,
        source.policy if threshold is None else threshold,
        optimize=optimize,
        labels=source.classes,
        preprocessing=_preprocessing(source, ee),
    )
    written = f"Written to {out} ({out.stat().st_size / 2**20:.1f} MiB)"
    policy = ee.policy if source.policy is None else source.policy
    if threshold is not None or policy is None:
        return [*verdict, written]
    return [
        *verdict,
        f"{source.method or ee.method.name}: τ = {policy.shown()}{source.why}",
        *([f"  {policy.guarantee}"] if policy.guarantee else []),
        written,
        *next_with(out),
    ]


def _verdict(exits: Path) -> list[str]:
    """What ``exitkit retrofit`` said of exits in its folder, in a line; a warning where that was not to ship them."""
    kept = exits.parent / RESULT
    if exits.name != EXITS or not kept.exists():
        return []
    found = dict(read_json(kept, _AGAIN))
    if found.get("verdict") == "exits" and found.get("instead") is None:  # older files have no instead
        return [f"exits: {found.get('reason')}"]
    warnings.warn(f"exitkit retrofit advises against these exits: {found.get('reason')}", stacklevel=2)
    return []


def _with_what_is_beside(place: str) -> Source:
    """Exits, with what the folder that they lie in tells: a run's, or that of ``exitkit retrofit``."""
    exits = Path(place).resolve()
    folder = exits.parent.parent
    if exits == exits_folder(folder, exits.name) and outputs_file(folder, exits.name).is_file():
        known = _known(read_run(folder, regression=True), exits.name, place)
        return known if known.policy is not None else replace(known, method=None)  # τ may be saved with the exits
    names, prepared = exits.parent / CLASSES, exits.parent / PREPROCESSING
    if exits.name != EXITS:
        return Source(place)
    return Source(
        place,
        classes=read_labels(str(names)) if names.is_file() else None,
        preprocessing=preprocessing_from_json(dict(read_json(prepared, _AGAIN))) if prepared.is_file() else None,
    )


def _preprocessing(source: Source, ee: MultiExitModel) -> Preprocessing | None:
    """Of texts with the model's own tokenizer; of images as the run had them. None: as the model declares."""
    model = str(source.model)
    if not (model.startswith("hf:") and ee.example.text):
        return source.preprocessing
    keys = [str(key) for key in ee.example.spec.keys]
    return TextPreprocessing.of(load_tokenizer(model.removeprefix("hf:")), keys, source.max_length, ee.backbone)


def next_with(out: Path) -> list[str]:
    """What to do with a package that was written, in lines."""
    package = shlex.quote(str(out))
    timed_on = "" if (out.parent / INPUTS).is_file() else " INPUTS"
    return [
        "To go on:",
        f"  exitkit run {package} INPUTS      # classify images or texts with it",
        f"  exitkit bench-latency {package}{timed_on}   # time it on this machine",
    ]


def _known(run: Run, name: str, exits: str) -> Source:
    about, calibrated = run.about, run.results[name].calibrated
    count = run.results[name].outputs.log_probs.shape[2]
    weights = run.directory / BACKBONE
    found = calibrated is not None and calibrated.chosen.found
    return Source(
        exits,
        _text(run, "model"),
        str(weights) if weights.exists() else _text(run, "weights"),
        _number(run, "num_classes"),
        calibrated.chosen if found and calibrated is not None else None,
        run.classes if run.classes is not None and len(run.classes) == count else None,
        preprocessing_from_json(about.get("preprocessing")),
        _number(run, "max_length"),
        name,
    )


def _chosen(run: Run, method: str | None) -> tuple[str, str]:
    """The name of the method to export, and a phrase on why it was taken of several."""
    if method is not None:
        if method not in run.results:
            raise unknown_name("--method", method, run.results)
        return method, ""
    if (promised := cheapest_promised(run.results)) is not None:
        why = f" (of {', '.join(run.results)} the cheapest that keeps its promise)" if len(run.results) > 1 else ""
        return promised, why
    if len(run.results) == 1:
        return next(iter(run.results)), ""
    raise ArgumentError(
        f"RUN_DIR {str(run.directory)!r} has the methods {', '.join(run.results)}, and nothing is promised of any: run "
        f"exitkit calibrate {run.directory} first, or give --method and --threshold"
    )


def _one(found: list[Path], folder: Path) -> Path:
    if len(found) == 1:
        return found[0]
    if not found:
        raise ArgumentError(
            f"--exits {str(folder)!r} holds no exits; name a folder that save_pretrained wrote, or a run of exitkit bench"
        )
    raise ArgumentError(
        f"--exits {str(folder)!r} holds those of {', '.join(path.name for path in found)}; name one folder"
    )


def _text(run: Run, name: str) -> str | None:
    value = run.about.get(name)
    if not isinstance(value, str | None):
        raise FileError(f"the results in {str(run.directory)!r} have {name} = {value!r}, which is no text; run again")
    return value


def _number(run: Run, name: str) -> int | None:
    value = run.about.get(name)
    return value if isinstance(value, int) else None


def read_labels(given: str) -> list[str]:
    """Names of classes: a file of one name a line, or names with commas between.

    Raises:
        ArgumentError: neither.
        FileError: a file that is not UTF-8.
    """
    path = Path(given)
    if not path.is_file():
        if "," not in given:
            raise ArgumentError(
                f"--labels {given[:200]!r} is no file, and a single name; give a file of one name a line, or a,b,c"
            )
        return [name.strip() for name in given.split(",")]
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"--labels {given!r} cannot be read as UTF-8 text: {error}") from error
