"""Memory and CPU time of one loss step at the Qwen vocabulary: ours beside torch's own kl_div.

    python -m benchmarks.distillation_loss

Forward and backward in float32 on one thread, each method in a fresh process. The peak is that of
resident memory after the inputs are made (Linux: VmHWM, reset through clear_refs), so the gradient
of the head, which every method needs, is part of it.

Shape letters: N positions, V vocabulary, D hidden.
"""

import argparse
import json
import time
from typing import Any

from benchmarks.processes import child, forget_peak, peak_bytes, resident_bytes

V, N, D = 152_064, 256, 256
METHODS = ("ours", "kl_div")


def measure(method: str) -> dict[str, Any]:
    """Run one step in this process."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    from distill.losses import distillation_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student_ND = torch.randn(N, D, requires_grad=True)
    teacher_ND = torch.randn(N, D)
    head_VD, teacher_head_VD = (torch.empty(V, D).normal_(std=0.05) for _ in range(2))
    head_VD.requires_grad_()
    targets_N = torch.randint(V, (N,))
    forget_peak()
    before_bytes = resident_bytes()
    started = time.process_time()
    if method == "ours":
        loss = distillation_loss(student_ND, head_VD, teacher_ND, teacher_head_VD, targets_N)
    else:
        loss = kl_div(
            log_softmax(student_ND @ head_VD.T, -1),
            log_softmax(teacher_ND @ teacher_head_VD.T, -1),
            reduction="batchmean",
            log_target=True,
        )
    loss.backward()  # type: ignore[no-untyped-call]
    cpu_s = time.process_time() - started
    extra_peak_bytes = peak_bytes() - before_bytes
    gradients = {"state": student_ND.grad, "head": head_VD.grad}
    return {
        "loss": loss.item(),
        "extra_peak_bytes": extra_peak_bytes,
        "cpu_s": round(cpu_s, 2),
        # Along a fixed direction: equal sums mean equal gradients.
        **{f"{name}_gradient_sum": _signed_sum(value) for name, value in gradients.items()},
    }


def _signed_sum(gradient: Any) -> float:
    import torch

    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (gradient.shape[1],), generator=generator) * 2.0 - 1
    rows = gradient.double() @ signs.double()
    return float((rows * torch.linspace(-1, 1, len(rows), dtype=torch.float64)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, help="One method, in this process.")
    method = parser.parse_args().method
    if method:
        print(json.dumps(measure(method)))
        return
    results: dict[str, Any] = {"vocabulary": V, "positions": N, "hidden": D}
    for name in METHODS:
        results[name] = child("benchmarks.distillation_loss", "--method", name)
    ours, plain = (results[name] for name in METHODS)
    results["relative_difference"] = {
        key: abs(ours[key] - plain[key]) / abs(plain[key])
        for key in ("loss", "head_gradient_sum", "state_gradient_sum")
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
