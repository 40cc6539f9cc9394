"""What the README promises, from end to end: a model of Hugging Face's and text come in, a student goes back out."""

import json
import pathlib

import pytest
import transformers
from conftest import SMOKE, execute
from golden import make as golden
from letters import save_letters, texts_of
from safetensors.numpy import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

STUDENT = """
base_config: {smoke}
base_output_directory: {runs}
metrics_file: ${{base_output_directory}}/${{run_name}}/metrics.jsonl
model_name: tiny-qwen3
dataset_type: grain
grain_file_type: arrayrecord
grain_train_files: {corpus}/train-*.arrayrecord
grain_eval_files: {corpus}/eval-*.arrayrecord
grain_worker_count: 0
grain_worker_count_eval: 0
eval_interval: 3
enable_tensorboard: true
"""


def test_a_teacher_and_text_become_a_student_by_the_documented_commands(tmp_path: pathlib.Path) -> None:
    def command(script: str, *words: object) -> str:
        result = execute([script], list(map(str, words)), tmp_path / "outputs")
        assert result.status == 0, result.output[-4000:]
        return result.output

    golden.write("qwen3", tmp_path / "hf", files=2)
    save_letters(tmp_path / "hf")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of(120, 3)))

    said = command(
        "scripts/convert_teacher.py", "--hf", tmp_path / "hf", "--output", tmp_path / "t", "--model-name", "qwen3-0.6b"
    )
    corpus = tmp_path / "corpus"
    command("scripts/prepare_text.py", tmp_path / "text.jsonl", "--out", corpus, "--shards", 2, "--eval-fraction", 0.2)

    yml = tmp_path / "student.yml"
    words = [line.strip() for line in said.splitlines()]
    teacher = next(line for line in words if "use_kd=true" in line).partition("my_student.yml ")[2].split(" ", 3)
    tokens = words[words.index("tokens, in my_student.yml:") + 1 :]
    settings = STUDENT.format(smoke=SMOKE, runs=tmp_path / "runs", corpus=corpus)
    yml.write_text("\n".join([settings, *tokens]))
    shape = ("override_model_config=true", f"vocab_size={golden.SMALL['vocab_size']}")
    for name, alpha in (("ce", 0), ("kd", 1)):
        keys = [word.replace("'", "") for word in teacher]
        command("MaxText/train.py", yml, f"run_name={name}", f"kd_alpha={alpha}", *keys, *shape)

    command("scripts/compare_runs.py", tmp_path / "runs/ce", tmp_path / "runs/kd", "--out", tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    assert "Held-out cross-entropy by compute" in page and "kd_alpha" in page

    command("scripts/export_student.py", "--run", tmp_path / "runs/kd", "--output", tmp_path / "out", yml, *shape)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("qwen3", 3, 96)
    assert load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"].shape == (96, 96)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("abc")).replace(" ", "").startswith("abc")
