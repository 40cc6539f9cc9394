"""The runs of `make demo-smollm2`: one shape of student, its beginnings, and what it learns from.

All students read the same rows, in an order of their seed's. Those on stored targets read them from a cache, which
serves their evaluations too; two have the teacher beside them, and one learns without, on more text.
"""

from dataclasses import dataclass, replace
from typing import Any

from carry import ROOT, Caching, Run

OUT = ROOT / "runs/smollm2"
CONFIG = "configs/demo/smollm2.yml"
BATCH, LENGTH = 4, 256  # of CONFIG
LONGER = 5  # about what a step costs with the teacher in it, over one without
EVALUATIONS = 5  # of a run, and one after its first step
LIVE_EVALUATIONS = 2  # where the teacher reads the evaluation rows each time: as long as ten steps
CALIBRATION_ROWS = 64  # that the teacher reads to choose what is kept of it

TEACHER_ITEMS = "runs/smollm2/teacher/0/items"
CUTTER = "scripts/init_student.py"
LIVE = (f"kd_teacher_parameters_path={TEACHER_ITEMS}", "kd_teacher_model_name=smollm2-135m")
BUCKET = "kd_truncation_strategy=other_bucket"
TOP_K = ("kd_top_k=64", BUCKET)
# MaxText wants a path from the root. Published weights are larger than drawn ones: at the others' learning rate of 2e-3
# the cross-entropy of a cut student rose from 10 to 62 in three steps, at this one it fell to 7.6 in twelve.
CUT = (f"load_parameters_path={OUT}/cut/0/items", "learning_rate=5.e-4")
# Without a teacher the table begins as MaxText draws it, unless it is told how the others' do.
LONG = (
    "use_kd=false",
    f"kd_embedding_std={192**-0.5:.6f}",
    "grain_train_files=runs/smollm2/corpus/train_long.arrayrecord",
)
WSD = (
    *("lr_schedule_type=wsd", "wsd_decay_steps_fraction=0.2"),
    *("kd_alpha_schedule=wsd", "kd_alpha_start=0.0", "kd_alpha=1.0", "kd_alpha_end=0.5"),
)


@dataclass(frozen=True)
class Making(Run):
    """A checkpoint that a command with options makes: its output is the run's folder."""

    @property
    def command(self) -> list[str]:
        return [word for word in super().command if word]

    @property
    def settings(self) -> dict[str, Any]:
        return {"options": list(self.overrides)}

    @property
    def is_there(self) -> bool:
        return (self.folder / "0/items").exists()

    def outcome(self) -> str:
        return f"{self.folder.relative_to(ROOT)}/0/items"


@dataclass(frozen=True)
class Student(Run):
    """A student of one seed.

    Attributes:
      kind: those that differ in their seed alone are of one.
      read_for: the rows that the teacher reads for a row of the student's: 1, or 0 for one that learns without.
      read_before: the rows that the teacher has read before the student begins.
    """

    kind: str = ""
    read_for: int = 1
    read_before: int = 0


@dataclass(frozen=True)
class Plan:
    """What is made, in this order."""

    teacher: Run
    caches: tuple[Run, ...]
    cut: Run
    students: tuple[Student, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return (self.teacher, *self.caches, self.cut, *self.students)


def conversion(hf: str) -> Run:
    options = ("--hf", hf, "--output", "runs/smollm2/teacher", "--model-name", "smollm2-135m")
    return Making("teacher", "teacher", "", options, "scripts/convert_teacher.py", OUT)


def cache(name: str, teacher: Run, rows: int, *overrides: str) -> Run:
    given = (f"run_name={name}", f"kd_cache_path=runs/smollm2/{name}", f"kd_cache_rows={rows}", *LIVE, *overrides)
    return Caching(name, name, CONFIG, given, "MaxText/cache_teacher.py", OUT, (teacher,))


def cut_from(teacher: Run) -> Run:
    """The student's shape within the teacher's: a fifth of the layers, a third of all widths."""
    sizes = ("--layers", "6", "--emb", "192", "--heads", "3", "--kv-heads", "1", "--mlp", "512")
    how = ("--by", "importance", "--rows", str(CALIBRATION_ROWS), "--scan-layers", "false")
    options = (
        "--teacher",
        "runs/smollm2/teacher",
        *sizes,
        *how,
        "--output",
        "runs/smollm2/cut",
        CONFIG,
        "use_kd=false",
    )
    return Making("cut", "cut", "", options, CUTTER, OUT, (teacher,))


def plan(hf: str, steps: int, seeds: int) -> Plan:
    """The runs for a teacher in the folder, or of the name on the hub, `hf`."""
    teacher = conversion(hf)
    rows = steps * BATCH
    sampled = cache("sampled", teacher, rows)
    top_k = cache("top_k", teacher, rows, "kd_cache_mode=top_k", "kd_top_k=64")
    cut = cut_from(teacher)
    kinds = (
        student("ce", "CE", sampled, "kd_alpha=0", read_for=0),
        student("ce_long", f"CE, {LONGER} times the tokens", teacher, *LONG, read_for=0),
        student("kd_sampled", "KD, 50 stored draws", sampled),
        student("kd_top_k", "KD, stored top-k 64", top_k, *TOP_K),
        student("kd_top_p", "KD, top-p 0.9, live", teacher, *LIVE, "kd_top_p=0.9", BUCKET),
        student("kd_full", "KD, whole, live", teacher, *LIVE),
        student("cut_ce", "cut + CE", sampled, "kd_alpha=0", *CUT, read_for=0),
        student("cut_kd", "cut + KD, 50 draws", sampled, *CUT),
        student("cut_wsd", "cut + KD, WSD alpha", sampled, *CUT, *WSD),
    )
    begun = [cut_student(kind, cut) if set(CUT) <= set(kind.overrides) else kind for kind in kinds]
    students = [of_seed(kind, steps, seed) for seed in range(seeds) for kind in begun]
    students.sort(key=lambda student: is_long(student) and not student.name.endswith("_0"))  # of further seeds at last
    return Plan(teacher, (sampled, top_k), cut, tuple(students))


def is_long(student: Student) -> bool:
    """Whether it takes several times what those on stored targets do."""
    return student.kind == "ce_long" or set(LIVE) <= set(student.overrides)


def student(kind: str, title: str, source: Run, *overrides: str, read_for: int = 1) -> Student:
    """A kind of student that learns from a cache, or with the teacher at hand."""
    if isinstance(source, Caching):
        overrides = (f"kd_cache_path=runs/smollm2/{source.name}", *overrides)
    return Student(kind, title, CONFIG, overrides, out=OUT, after=(source,), kind=kind, read_for=read_for)


def cut_student(kind: Student, cut: Run) -> Student:
    return replace(kind, after=(*kind.after, cut), read_before=CALIBRATION_ROWS)


def of_seed(kind: Student, steps: int, seed: int) -> Student:
    name = f"{kind.kind}_{seed}"
    total = steps * (LONGER if kind.kind == "ce_long" else 1)
    evaluations = LIVE_EVALUATIONS if set(LIVE) <= set(kind.overrides) else EVALUATIONS
    periods = (f"eval_interval={total // evaluations}", f"checkpoint_period={total // EVALUATIONS}")
    length = (f"steps={total}", *periods)
    seeds = (f"init_weights_seed={seed}", f"data_shuffle_seed={seed}")
    return replace(kind, name=name, overrides=(f"run_name={name}", *length, *seeds, *kind.overrides))
