"""The runs of `make demo`."""

from carry import ROOT, Caching, Run

OUT = ROOT / "runs/demo"

TEACHER = Run("teacher", "teacher", "configs/demo/teacher.yml")


def student(name: str, title: str, alpha: int, *overrides: str, after: tuple[Run, ...] = (TEACHER,)) -> Run:
    given = (f"run_name={name}", f"kd_alpha={alpha}", *overrides)
    return Run(name, title, "configs/demo/student.yml", given, after=after)


SMALL = "grain_train_files=runs/demo/corpus/train_small.arrayrecord"
STUDENT_CE = student("student_ce", "CE student", 0)
STUDENT_KD = student("student_kd", "KD student", 1)
SMALL_CE = student("small_ce", "CE student", 0, SMALL)
SMALL_KD = student("small_kd", "KD student", 1, SMALL)
# The rows that the students read, and those of the evaluations.
ROWS = "kd_cache_rows=2400"
CACHE = Caching(
    "cache",
    "cache",
    STUDENT_KD.config,
    ("kd_cache_path=runs/demo/cache", ROWS),
    "MaxText/cache_teacher.py",
    after=(TEACHER,),
)
STUDENT_CACHED = student("student_cached", "KD from cache", 1, "kd_cache_path=runs/demo/cache", after=(TEACHER, CACHE))
RUNS = (TEACHER, STUDENT_CE, STUDENT_KD, SMALL_CE, SMALL_KD, CACHE, STUDENT_CACHED)
