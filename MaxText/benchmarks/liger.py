"""What others have: Liger Kernel's fused linear loss, measured beside ours on the same GPU, in a process of its own.

    python MaxText/benchmarks/liger.py <tokens> <vocabulary> <width> <teacher width> <rounds>

prints a line of JSON per chunk size: {"chunk", "seconds", "temp_bytes"}. Its JSD at beta = 0 is KL(teacher || student);
half of it and half of cross-entropy are what our rows compute, in bfloat16. It needs torch, a GPU and liger_kernel.
"""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

CHUNKS = (1024, 2048, 4096)  # tokens; 1024 is its default


def is_here() -> bool:
    """Whether it is installed, and a GPU for it is at hand. Nothing is imported that would take the GPU's memory."""
    return all(importlib.util.find_spec(name) for name in ("torch", "liger_kernel")) and Path("/dev/nvidia0").exists()


def measured(tokens: int, vocabulary: int, width: int, teacher_width: int, rounds: int) -> list[dict]:
    """What the command prints."""
    arguments = [str(number) for number in (tokens, vocabulary, width, teacher_width, rounds)]
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if run.returncode:
        print(f"warning: Liger was not measured: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def main(tokens: int, vocabulary: int, width: int, teacher_width: int, rounds: int) -> None:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(*shape, device="cuda")).to(torch.bfloat16)

    def head_of(width: int) -> torch.Tensor:
        return normal(vocabulary, width, spread=width**-0.5)

    hidden, head = normal(tokens, width).requires_grad_(), head_of(width).requires_grad_()
    teacher_hidden, teacher_head = normal(tokens, teacher_width), head_of(teacher_width)
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")
    held = torch.cuda.memory_allocated()
    for chunk in CHUNKS:
        loss = LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.0, temperature=2.0, compiled=True, chunk_size=chunk)
        seconds = []
        for number in range(rounds + 2):
            hidden.grad = head.grad = None
            if number == 2:  # compiled, and warm
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss(hidden, head, teacher_hidden, teacher_head, targets).backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        row = {"chunk": chunk, "seconds": seconds[2:], "temp_bytes": torch.cuda.max_memory_allocated() - held}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
