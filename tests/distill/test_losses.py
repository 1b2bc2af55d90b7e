import pytest
import torch
from torch import Tensor
from torch.nn import functional

from client.batches import Example, collate
from client.model import load_model
from client.settings import TrainingSettings
from client.training import learned_positions, train
from distill.losses import DistillationLoss, distillation_loss
from tests.distill.models import examples_of

N, V, D, E = 13, 50, 8, 6


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    targets = torch.randint(V, (N,), generator=generator)
    return (*tensors, targets)


def oracle(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
    temperature: float,
    weight: float,
) -> Tensor:
    """The same number from torch's own losses, over whole matrices of logits."""
    logits, wanted = student @ student_head.T, teacher @ teacher_head.T
    divergence = functional.kl_div(
        functional.log_softmax(logits / temperature, -1),
        functional.log_softmax(wanted / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    ce = functional.cross_entropy(logits, targets)
    return (1 - weight) * temperature**2 * divergence + weight * ce


@pytest.mark.parametrize("rows", [1, 5, N, 100])
@pytest.mark.parametrize(
    ("temperature", "weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (3.0, 0.4), (2.0, 1.0)]
)
def test_loss_and_gradients_are_those_of_torch(
    temperature: float, weight: float, rows: int
) -> None:
    student, student_head, teacher, teacher_head, targets = inputs()
    student.requires_grad_()
    student_head.requires_grad_()
    loss = distillation_loss(
        student,
        student_head,
        teacher,
        teacher_head,
        targets,
        temperature=temperature,
        cross_entropy_weight=weight,
        chunk_bytes=4 * V * rows,
    )
    expected = oracle(student, student_head, teacher, teacher_head, targets, temperature, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    # A factor, as gradient accumulation has it.
    got = torch.autograd.grad(loss * 0.25, (student, student_head))
    wanted = torch.autograd.grad(expected * 0.25, (student, student_head))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_gradient_is_the_slope_of_the_loss() -> None:
    student, student_head, teacher, teacher_head, targets = inputs()
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).double()

    def loss_at(point: Tensor) -> Tensor:
        return distillation_loss(
            point, student_head, teacher, teacher_head, targets, temperature=2.0
        )

    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(student), student)
    step = 1e-6
    with torch.no_grad():
        slope = (loss_at(student + step * direction) - loss_at(student - step * direction)) / (
            2 * step
        )
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-7)


def test_temperature_changes_the_loss_not_the_size_of_its_gradient() -> None:
    student, student_head, teacher, teacher_head, targets = inputs()
    norms, losses = [], []
    for temperature in (20.0, 40.0):
        point = student.clone().requires_grad_()
        loss = distillation_loss(
            point, student_head, teacher, teacher_head, targets, temperature=temperature
        )
        loss.backward()
        assert point.grad is not None
        losses.append(loss.item())
        norms.append(point.grad.norm().item())
    plain = distillation_loss(student, student_head, teacher, teacher_head, targets).item()
    assert abs(losses[0] - plain) > 0.1 * plain
    # At high temperature the T² makes the gradient independent of T.
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_bfloat16_states_over_a_float32_head() -> None:
    student, student_head, teacher, teacher_head, targets = inputs(torch.float32)
    half, teacher_half = student.bfloat16().requires_grad_(), teacher.bfloat16()
    student_head.requires_grad_()
    loss = distillation_loss(
        half, student_head, teacher_half, teacher_head, targets, chunk_bytes=4 * V * 5
    )
    exact = half.detach().float().requires_grad_()
    expected = oracle(exact, student_head, teacher_half.float(), teacher_head, targets, 1.0, 0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    loss.backward()
    head_gradient, expected_gradient = student_head.grad, None
    student_head.grad = None
    expected.backward()
    expected_gradient = student_head.grad
    assert head_gradient is not None
    assert expected_gradient is not None
    assert head_gradient.dtype == torch.float32
    difference = (head_gradient - expected_gradient).norm() / expected_gradient.norm()
    assert difference < 0.02


def test_different_vocabularies_and_empty_batches_are_refused() -> None:
    student, student_head, teacher, teacher_head, targets = inputs()
    with pytest.raises(ValueError, match="49 rows, the student's 50"):
        distillation_loss(student, student_head, teacher, teacher_head[:49], targets)
    with pytest.raises(ValueError, match="no learned position"):
        distillation_loss(student[:0], student_head, teacher[:0], teacher_head, targets[:0])


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    student, *rest = inputs()
    loss = distillation_loss(student.requires_grad_(), *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_tied_embeddings_get_the_gradient_of_both_their_uses(tiny_model, tmp_path) -> None:
    teacher, student = load_model(tiny_model, "float32"), load_model(tiny_model, "float32")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    batch = collate(examples_of(tiny_model, tmp_path, 4), pad_id=0)
    loss = DistillationLoss(
        teacher, temperature=1.0, cross_entropy_weight=0.0, dtype=torch.float32
    )(student, batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    hidden, targets = learned_positions(student, batch)
    with torch.no_grad():
        wanted, _ = learned_positions(teacher, batch)
    oracle(
        hidden, student.lm_head.weight, wanted, teacher.lm_head.weight, targets, 1.0, 0.0
    ).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_accumulated_batches_make_the_step_of_one_large_batch(tiny_model, tmp_path) -> None:
    examples: list[Example] = examples_of(tiny_model, tmp_path, 8)
    teacher = load_model(tiny_model, "float32")
    weights = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        student = load_model(tiny_model, "float32")
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.9)
        settings = TrainingSettings(
            num_steps=2, batch_size=batch_size, accumulation=accumulation, learning_rate=1e-3
        )
        loss_function = DistillationLoss(
            teacher, temperature=2.0, cross_entropy_weight=0.2, dtype=torch.float32
        )
        train(student, examples, settings, pad_id=0, loss_function=loss_function)
        weights.append(student.model.embed_tokens.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
