"""The names of all files and folders that a run leaves, and where what belongs to another file lies beside it.

    OUT/                 of `compress`, and of `demo`, which has the first three beside
      demo.json          what the demo is of
      text/              the prose haystack
      dense/             the dense model as safetensors
      recipe.json        what the run is of
      seconds.json       time that every step took
      profile/           as `profile` leaves it
      plan.json          as `search` leaves it, with what lies beside it
      model/             as `export` leaves it
      eval.json          as `eval -o` leaves it, with the scores beside it
      summary.json
      bench.json         as `bench -o` leaves it, with the cells beside it
      report.html        as `report` leaves it

Nothing else spells these names, and what `--overwrite` removes is what is listed here. The functions `of_...` return it in
the reverse order of its making: what is half removed looks as if it had stopped earlier, and can be taken up again.
"""

from __future__ import annotations

from pathlib import Path

RECIPE_FILE = "recipe.json"
PROFILE_FOLDER = "profile"
PLAN_FILE = "plan.json"
MODEL_FOLDER = "model"
EVALUATION_FILE = "eval.json"
BENCH_FILE = "bench.json"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
SECONDS_FILE = "seconds.json"

DEMO_FILE = "demo.json"
DENSE_FOLDER = "dense"
TEXT_FOLDER = "text"

MANIFEST_FILE = "profile.json"
"""What a profile is of; it lies in the profile's folder, as do the next eight."""
CALIBRATION_FILE = "calibration.safetensors"
VALIDATION_FILE = "validation.safetensors"
ROUNDING_FILE = "weights.json"
SAMPLES_FOLDER = "samples"
INFLUENCE_FILE = "influence.safetensors"
GATES_FILE = "gates.safetensors"
ANSWERS_FILE = "answers.jsonl"
SHINGLES_FILE = "calibration.shingles"
AUDIT_FILE = "audit.json"

HEAL_FILE = "heal.json"
"""What a heal is of; it lies in the work folder, as do the next three."""
HEAL_HISTORY_FILE = "history.json"
HEAL_CHECKPOINTS_FOLDER = "checkpoints"
HEAL_BEST_FILE = "best.safetensors"

PARTIAL = ".partial"
"""End of the name of a folder that is being written, or removed."""
REPLACED = ".replaced"
"""End of the name that a whole folder has while another one takes its place."""
TEMPORARY = ".tmp"
"""End of the name of a file that is being written."""
HOLDER = ".owner"
"""End of the name of the file that says which process works on something; see `holders`."""


def holder_of_file(path: Path) -> Path:
    """Returns where the lock holder of a file stands, or of a folder that is going to be moved: beside it."""
    return path.parent / f".{path.name}{HOLDER}"


def holder_of_folder(folder: Path) -> Path:
    """Returns where the lock holder of a folder stands: in it."""
    return folder / f".moacompress{HOLDER}"


def sample_file(folder: Path, index: int) -> Path:
    """Returns where the statistics of a sample are in a profile's folder."""
    return folder / SAMPLES_FOLDER / f"{index:05d}.safetensors"


def study_journal(plan: Path) -> Path:
    """Returns where the study of a search is that has no storage of its own: `plan.study.journal` for `plan.json`."""
    return plan.with_suffix(".study.journal")


def journal_lock(journal: Path) -> Path:
    """Returns the lock that Optuna holds while it writes a line; a killed process leaves it."""
    return journal.with_name(f"{journal.name}.lock")


def baselines_folder(plan: Path) -> Path:
    """Returns where a search leaves the best plan of every baseline."""
    return plan.with_suffix(".baselines")


def explanation_file(plan: Path) -> Path:
    """Returns where a search says why the plan is as it is."""
    return plan.with_suffix(".explain.json")


def gates_file(plan: Path) -> Path:
    """Returns where the gates of a plan are, where it has some: `plan.gates.safetensors` for `plan.json`."""
    return plan.with_suffix(".gates.safetensors")


def shingles_file(plan: Path) -> Path:
    """Returns where the shingles are of what a plan was calibrated on: `plan.shingles` for `plan.json`."""
    return plan.with_suffix(".shingles")


def plan_named(plan: Path, name: str) -> Path:
    """Returns one of several plans: `plan-NAME.json` for `plan.json`."""
    return plan.with_name(f"{plan.stem}-{name}{plan.suffix or '.json'}")


def front_file(plan: Path) -> Path:
    """Returns where several plans are listed, with their bytes and their KL."""
    return plan.with_name(f"{plan.stem}.front.json")


def scouts_folder(plan: Path) -> Path:
    """Returns where the plans are that find the smallest budget for a loss."""
    return plan.with_suffix(".scouts")


def heal_folder(out: Path) -> Path:
    """Returns where a heal works until its checkpoint is done: `model.heal` for `model`."""
    return out.with_name(f"{out.name}.heal")


def scores_file(evaluation: Path) -> Path:
    """Returns where an evaluation keeps its finished scores: `eval.scores.jsonl` for `eval.json`."""
    return evaluation.with_name(f"{evaluation.stem}.scores.jsonl")


def cells_file(bench: Path) -> Path:
    """Returns where a benchmark keeps its finished cells: `bench.cells.jsonl` for `bench.json`."""
    return bench.with_name(f"{bench.stem}.cells.jsonl")


def audit_records_file(audit: Path) -> Path:
    """Returns where an audit keeps what it measured: `audit.ledger.jsonl` for `audit.json`."""
    return audit.with_name(f"{audit.stem}.ledger.jsonl")


def page_file(audit: Path) -> Path:
    """Returns where the plot of an audit is."""
    return audit.with_suffix(".html")


def of_search(plan: Path) -> list[Path]:
    """Returns all that a search leaves at `plan` and beside it."""
    journal = study_journal(plan)
    return [
        plan,
        gates_file(plan),
        shingles_file(plan),
        scouts_folder(plan),
        baselines_folder(plan),
        explanation_file(plan),
        journal,
        journal_lock(journal),
    ]


def of_audit(audit: Path) -> list[Path]:
    """Returns all that an audit leaves."""
    return [audit, page_file(audit), audit_records_file(audit)]


def of_profile(folder: Path) -> list[Path]:
    """Returns all that is left in the folder of a profile: by `profile`, and by an audit of it."""
    return [*of_audit(folder / AUDIT_FILE), *of_samples(folder)]


def of_samples(folder: Path) -> list[Path]:
    """Returns all that `profile` leaves in its folder."""
    names = (
        GATES_FILE,
        INFLUENCE_FILE,
        SAMPLES_FOLDER,
        VALIDATION_FILE,
        ROUNDING_FILE,
        CALIBRATION_FILE,
        ANSWERS_FILE,
        SHINGLES_FILE,
        MANIFEST_FILE,
    )
    return [folder / name for name in names]


def of_heal(folder: Path) -> list[Path]:
    """Returns all that a heal leaves in its work folder."""
    names = (HEAL_BEST_FILE, HEAL_CHECKPOINTS_FOLDER, HEAL_HISTORY_FILE, ANSWERS_FILE, HEAL_FILE)
    return [folder / name for name in names]


def of_evaluation(evaluation: Path) -> list[Path]:
    """Returns all that `eval` leaves."""
    return [evaluation, scores_file(evaluation)]


def of_bench(bench: Path) -> list[Path]:
    """Returns all that `bench` leaves."""
    return [bench, cells_file(bench)]


def of_compress(out: Path) -> list[Path]:
    """Returns all that `compress` leaves in its folder, and what `bench` leaves there of its model."""
    return [
        out / REPORT_FILE,
        *of_bench(out / BENCH_FILE),
        out / SUMMARY_FILE,
        *of_evaluation(out / EVALUATION_FILE),
        out / MODEL_FOLDER,
        *of_search(out / PLAN_FILE),
        *of_profile(out / PROFILE_FOLDER),
        out / SECONDS_FILE,
        out / RECIPE_FILE,
    ]


def of_demo(out: Path) -> list[Path]:
    """Returns all that `demo` leaves in its folder beside what `compress` does."""
    return [out / DENSE_FOLDER, out / TEXT_FOLDER, out / DEMO_FILE]
