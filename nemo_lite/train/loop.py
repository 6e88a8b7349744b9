"""The training loop: one function that reads top to bottom, and the step it repeats."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_lite import process
from nemo_lite.config import Recipe, UserError, recipe_to_yaml
from nemo_lite.data import PackedLoader, check_vocabulary, load_tokenizer, prepare, validation_batches
from nemo_lite.data.mixture import budget_warnings, expected, lines, refuse_short, table, warnings
from nemo_lite.model.hybrid import HybridLM, Normalizers
from nemo_lite.parallel.layers import Layers
from nemo_lite.parallel.native import (
    World,
    gradient_norm,
    parallelize,
    stop,
    sum_replicated_gradients,
)
from nemo_lite.parallel.native import start as start_world
from nemo_lite.precision.linear import Numerics
from nemo_lite.precision.recipe import formats as number_formats
from nemo_lite.precision.statistics import Statistics
from nemo_lite.process import PROCESS_FILE
from nemo_lite.train.checkpoint import Checkpointer, checkpoints, newest_whole, read_state
from nemo_lite.train.loss import label_counts
from nemo_lite.train.metrics import Metrics, environment, load_summary, memory_gb, peak_flops
from nemo_lite.train.optim import build_optimizer, clip_, update_router_biases
from nemo_lite.train.schedule import learning_rate

MEGATRON = "0.16."  # releases of Megatron-core whose inner parts are those that the engine uses


@dataclass
class TrainState:
    """Where a run is. It is in every checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0


@dataclass
class StepResult:
    """What one step measured, over all ranks."""

    losses: list[float]  # next token, then each MTP depth
    aux_loss: float
    grad_norm: float
    finite: bool
    stop: bool
    expert_counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return self.losses[0]


def train(recipe: Recipe) -> Path:
    """Train as the recipe says, or go on with the run that its run_dir holds; the run's directory."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    engine = engine_of(recipe)
    with ExitStack() as stack:
        world = engine.start(recipe)
        stack.callback(engine.stop, world)
        return _train(recipe, engine, world, stack)


def engine_of(recipe: Recipe) -> Any:
    """What starts processes (`start`, `stop`) and trains on them (`Trainer`): the recipe's engine."""
    if not recipe.parallel.uses_megatron:
        return Native
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("the megatron engine needs Megatron-core: pip install 'nemo-lite[megatron]'") from None
    if not version.startswith(MEGATRON):
        raise UserError(
            f"the megatron engine works with Megatron-core {MEGATRON}x and this is {version}: "
            "pip install 'nemo-lite[megatron]'"
        )
    try:
        from nemo_lite.parallel import megatron
    except Exception as error:  # a broken install of what it imports may raise anything
        raise UserError(f"Megatron-core {version} cannot be imported: {type(error).__name__}: {error}") from error
    return megatron


class Native:
    """One process, or FSDP2: the engine whose parts are in parallel/native.py and below."""

    @staticmethod
    def start(recipe: Recipe) -> World:
        return start_world(recipe.train.device)

    stop = staticmethod(stop)

    class Trainer:
        def __init__(self, recipe: Recipe, world: World, fresh: bool):
            self.recipe, self.world = recipe, world
            self.model = build_model(recipe, world, fresh)
            self.optimizer = build_optimizer(self.model, recipe.optim)

        def step(self, micros: list[Any], rate: float, stopping: bool) -> StepResult:
            return train_step(self.model, self.optimizer, micros, rate, self.recipe, self.world, stopping)

        def evaluate(self, batches: Iterable, byte_lengths: Tensor) -> dict[str, Any]:
            return evaluate(self.model, batches, byte_lengths, self.world)


def _train(recipe: Recipe, engine: Any, world: World, stack: ExitStack) -> Path:
    run_dir, config = Path(recipe.run_dir or "runs/run"), recipe.train
    say = (lambda text: print(text, flush=True)) if world.main else (lambda text: None)

    # Data.
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_vocabulary(tokenizer, recipe.model.vocab_size)
    world.on_main(lambda: prepare(recipe.data, tokenizer, validation=recipe.eval.every > 0, progress=say))
    loader = stack.enter_context(
        PackedLoader(
            recipe.data, tokenizer, seed=recipe.seed, global_batch_size=config.global_batch_size, rank=world.data_rank,
            world_size=world.data_size, device=world.device, run_tokens=recipe.run_tokens,
        )
    )  # fmt: skip
    planned = expected(loader.mixture, loader.tokens_per_epoch, recipe.run_tokens)
    refuse_short(planned)
    held_out = None
    if recipe.eval.every:
        held_out = validation_batches(
            recipe.data, tokenizer, rows_per_batch=config.global_batch_size, num_batches=recipe.eval.batches,
            rank=world.data_rank, world_size=world.data_size, run_tokens=recipe.run_tokens,
        )  # fmt: skip
    byte_lengths = torch.tensor(tokenizer.byte_lengths(), device=world.device)

    # Model and optimizer.
    resume = world.on_main(lambda: _resume_from(run_dir, recipe, say))
    trainer = engine.Trainer(recipe, world, fresh=not resume)
    model, optimizer = trainer.model, trainer.optimizer
    if recipe.model.eos_token_id is None:
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eod_id, tokenizer.pad_id

    # Where the run is.
    state = TrainState()
    saver = Checkpointer(run_dir, recipe.checkpoint, world, say)
    stack.callback(saver.close)
    if resume:
        saved = saver.load(resume, model, optimizer)
        state = TrainState(**saved["train"])
        other = resume.parent.parent != run_dir
        try:
            loader.load_state_dict(saved["data"])
        except UserError as error:
            if not other:
                raise
            say(f"the data begin anew: {error}")
        say(f"{f'going on from {resume}' if other else f'resuming {run_dir}'} at step {state.step} of {config.steps}")

    metrics = None
    peak = peak_flops(world.device, getattr(torch, config.dtype))
    machine_peak = float(world.sum_(torch.tensor(peak[0] or 0.0, dtype=torch.float64, device=world.device)))
    from nemo_lite.check import flops_per_token, parameter_counts

    cycle = recipe.data.seq_len_cycle or [recipe.data.seq_len]
    flops = sum(flops_per_token(recipe.model, length)["train"] for length in cycle) // len(cycle)
    end = config.stop_after or config.steps
    if world.main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / PROCESS_FILE).write_text(json.dumps(process.facts()) + "\n")
        (run_dir / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        tokenizer.save_pretrained(run_dir / "tokenizer")
        counts = parameter_counts(recipe.model)
        facts = environment(
            recipe, list(model.kernel_choices), device=world.device, peak=peak,
            parameters={"total": counts["total"], "active": counts["active"]},
        )  # fmt: skip
        (run_dir / "env.json").write_text(json.dumps(facts, indent=1) + "\n")
        metrics = stack.enter_context(Metrics(run_dir, recipe.log, total_steps=config.steps, resume_step=state.step))
        metrics.note(_introduction(recipe, world, model, loader))
        metrics.note("\n".join(["what will be read:", *lines(table(planned))]))
        for warning in [*warnings(planned), *budget_warnings(recipe.data, recipe.run_tokens)]:
            metrics.note(f"warning: {warning}")

    def checkpoint() -> None:
        saver.save(
            state.step, model, optimizer,
            {"step": state.step, "train": vars(state).copy(), "data": loader.state_dict(),
             "model": _model_facts(recipe)},
        )  # fmt: skip

    model.train()
    window = Window(state)
    with signals() as stopping:
        batches = iter(loader)
        while state.step < end:
            waited = time.perf_counter()
            batch = next(batches)
            window.data_seconds += time.perf_counter() - waited
            more = recipe.data.seq_len // batch.input_ids.shape[1]  # rows for one of data.seq_len
            micros = list(batch.to(world.device).split(config.micro_batch_size * more))
            rate = learning_rate(state.step, config.steps, recipe.optim, recipe.schedule)
            model.numerics.on = state.step < config.steps - recipe.precision.bf16_last_steps
            model.numerics.step = state.step
            every = recipe.precision.statistics_every
            watch = world.main and every > 0 and model.numerics.on and (state.step + 1) % every == 0
            model.numerics.watch = statistics = Statistics() if watch else None
            # A checkpoint that one rank could not write stops them all, at the same step.
            result = trainer.step(micros, rate, stopping() or saver.failed)
            state.step += 1
            state.tokens += recipe.tokens_per_step
            window.add(result)
            if result.finite:
                state.nonfinite_in_a_row = 0
            else:
                _not_finite(state, batch, run_dir, recipe, world, metrics)
            last = state.step == end
            measured = {}
            if statistics is not None:
                measured["quantisation"] = statistics.record()
                window.leave_out(statistics.seconds)
                model.numerics.watch = None
            if metrics is not None:
                metrics.advance(state.step)
                if state.step % recipe.log.every == 0 or last or state.step == 1 or measured:
                    record = window.record(rate, machine_peak, flops, memory_gb(world.device), end)
                    metrics.log({**record, **measured, "sources": loader.realised()})
            if held_out is not None and (state.step % recipe.eval.every == 0 or last):
                began = time.perf_counter()
                record = trainer.evaluate(held_out, byte_lengths)
                if metrics is not None:
                    metrics.log({"step": state.step, "tokens": state.tokens, **record})
                window.leave_out(time.perf_counter() - began)
            due = recipe.checkpoint.every and state.step % recipe.checkpoint.every == 0
            if due or last or result.stop:
                checkpoint()
            if result.stop and not last:
                saver.wait()
                if metrics is not None:
                    metrics.note(f"stopped by a signal after step {state.step}; the same command goes on from there")
                break
    saver.wait()
    if metrics is not None:
        from nemo_lite.train.report import write_report

        read = [[each["source"], f"{each['tokens']:,}", f"{each['epochs']:.2f}"] for each in loader.realised()]
        metrics.note("\n".join(["what was read:", *lines([["source", "tokens", "epochs"], *read], left=1)]))
        metrics.note(f"checkpoint {run_dir}/checkpoints/step_{state.step}, report {write_report(run_dir)}")
        (run_dir / PROCESS_FILE).unlink(missing_ok=True)
    world.barrier()
    return run_dir


def build_model(recipe: Recipe, world: World, fresh: bool = True) -> HybridLM:
    """The recipe's model, sharded over the ranks, with initial weights (or init_from's) unless they come later."""
    try:
        formats = number_formats(recipe.model, recipe.precision)
        layers = Layers(world.device, vars(recipe.kernels), formats, Numerics(recipe.seed))
    except ValueError as error:
        raise UserError(str(error)) from error
    model = HybridLM(recipe.model, device="meta", layers=layers)
    if recipe.train.dtype == "float64":
        model = model.double()
    model.dtype = getattr(torch, recipe.train.dtype)
    model.head.chunk = recipe.train.loss_chunk
    model.recompute = recipe.train.recomputed
    model = parallelize(model, world, recipe)
    model.to_empty(device=world.device)
    if recipe.model.tie_word_embeddings:
        model.head.weight = model.embedding.weight
    if fresh and recipe.init_from:
        from nemo_lite.model.hf import load_weights

        if not Path(recipe.init_from).is_dir():
            raise UserError(f"init_from: {recipe.init_from} does not exist; the stage that writes it has to run first")
        load_weights(model, Path(recipe.init_from))
    elif fresh:
        model.init_weights(recipe.seed)
    if recipe.train.compile:
        for block in [*model.layers, *(model.mtp.layers if model.mtp is not None else [])]:
            block.compile()
    return model


def global_rows(recipe: Recipe, micros: list[Any]) -> float:
    """Rows of a step over all ranks: under data.seq_len_cycle as many more as they are shorter."""
    more = recipe.data.seq_len // micros[0].input_ids.shape[1] if recipe.data.seq_len_cycle else 1
    return float(recipe.train.global_batch_size * more)


def train_step(
    model: HybridLM,
    optimizer: torch.optim.Optimizer,
    micros: list[Any],
    rate: float,
    recipe: Recipe,
    world: World,
    stopping: bool = False,
) -> StepResult:
    """One optimizer step over this rank's microbatches of a global batch.

    Every sum is divided by the global batch's own count, known before the first backward. One all-reduce carries the
    losses, the routers' counts and whether a rank was asked to stop.
    """
    depth = model.depth
    counts = sum(label_counts(micro.labels, micro.doc_ids, depth) for micro in micros)
    counts = world.sum_(torch.as_tensor(counts, device=world.device))
    normalizers = Normalizers([float(n) for n in counts], global_rows(recipe, micros))
    names: list[str] = []
    measured: list[Tensor] = []
    for i, micro in enumerate(micros):
        if world.size > 1:
            model.set_requires_gradient_sync(i == len(micros) - 1)
        model.numerics.begin(i, world.rank)
        out = model(micro.input_ids, doc_ids=micro.doc_ids, labels=micro.labels, normalizers=normalizers)
        out.loss.backward()
        names = list(out.expert_counts)
        measured.append(torch.cat([out.losses, out.aux_loss[None], *out.expert_counts.values()]).double())
    sums = torch.stack(measured).sum(0)
    sums = world.sum_(torch.cat([sums, sums.new_tensor([float(stopping)])]))

    parameters = list(model.parameters())
    sum_replicated_gradients(parameters, world)
    norm = float(gradient_norm(parameters, world))
    losses = sums[: depth + 1].tolist()
    finite = math.isfinite(norm) and all(math.isfinite(x) for x in losses)
    experts = dict(zip(names, sums[depth + 2 : -1].split(model.config.n_routed_experts))) if names else {}
    if finite:
        clip_(parameters, norm, recipe.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        update_router_biases(model, experts)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(losses, float(sums[depth + 1]), norm, finite, bool(sums[-1] > 0), experts)


@torch.no_grad()
def evaluate(model: HybridLM, batches: Iterable, byte_lengths: Tensor, world: World) -> dict[str, Any]:
    """Validation: loss, MTP losses by depth, and bits per UTF-8 byte of the predicted tokens."""
    depth = model.depth
    totals = torch.zeros(2 * depth + 3, dtype=torch.float64, device=world.device)
    model.eval()
    for batch in batches:
        batch = batch.to(world.device)
        out = model(
            batch.input_ids, doc_ids=batch.doc_ids, labels=batch.labels,
            normalizers=Normalizers([1.0] * (depth + 1), 1.0),
        )  # fmt: skip
        totals[: depth + 1] += out.losses.double()
        totals[depth + 1 : -1] += label_counts(batch.labels, batch.doc_ids, depth)
        targets = batch.labels[:, 1:][(batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1]) & (batch.labels[:, 1:] >= 0)]
        totals[-1] += byte_lengths[targets].sum()
    model.train()
    sums = world.sum_(totals).tolist()
    losses = [total / max(count, 1.0) for total, count in zip(sums[: depth + 1], sums[depth + 1 : -1])]
    bits = sums[0] / math.log(2) / max(sums[-1], 1.0)
    return {"val_loss": losses[0], "val_mtp_loss": losses[1:], "val_bits_per_byte": bits}


class Window:
    """The steps since the last log line."""

    def __init__(self, state: TrainState):
        self.state = state
        self.clear()

    def clear(self) -> None:
        self.started, self.results, self.data_seconds = time.perf_counter(), [], 0.0

    def leave_out(self, seconds: float) -> None:
        """Validation took time that is not training's."""
        self.started += seconds

    def add(self, result: StepResult) -> None:
        self.results.append(result)

    def record(self, rate: float, peak: float, flops: int, memory: float, steps: int) -> dict[str, Any]:
        """The line of metrics.jsonl for these steps: the last step's losses, the interval's speed and expert load."""
        state, last = self.state, self.results[-1]
        seconds = time.perf_counter() - self.started
        done = len(self.results)
        speed = done * (state.tokens / state.step) / seconds
        experts: dict[str, Tensor] = {}
        for result in self.results:
            for name, n in result.expert_counts.items():
                experts[name] = experts.get(name, 0) + n
        record = {
            "step": state.step, "tokens": state.tokens, "loss": last.loss, "mtp_loss": last.losses[1:],
            "aux_loss": last.aux_loss, "lr": rate, "grad_norm": last.grad_norm, "tokens_per_second": speed,
            "mfu": speed * flops / peak if peak else None, "memory_gb": memory,
            "eta_seconds": (steps - state.step) * seconds / done, "skipped_steps": state.skipped_steps,
            "data_seconds": self.data_seconds,
            **(load_summary(experts) if experts else {}),
        }  # fmt: skip
        self.clear()
        return record


@contextmanager
def signals() -> Iterator[Any]:
    """Note SIGTERM and SIGINT instead of dying of them: the loop finishes its step and saves. Asked twice, it dies."""
    asked = False
    before = {}

    def note(number, frame) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
        asked = True

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals stay as they are
        before.clear()
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_finite(state: TrainState, batch, run_dir: Path, recipe: Recipe, world: World, metrics) -> None:
    """Count a skipped step; after too many in a row, save which batch it was and stop."""
    state.skipped_steps += 1
    state.nonfinite_in_a_row += 1
    if metrics is not None:
        metrics.note(
            f"step {state.step}: loss or gradient is not finite, step skipped ({state.nonfinite_in_a_row} in a row)"
        )
    if state.nonfinite_in_a_row >= recipe.train.max_nonfinite:
        path = run_dir / f"nonfinite_step_{state.step}_rank_{world.rank}.json"
        path.write_text(json.dumps({"step": state.step, "rows": batch.rows, "sources": batch.sources}) + "\n")
        raise UserError(
            f"the loss or gradient was not finite for {state.nonfinite_in_a_row} steps in a row; the last batch is "
            f"named in {path}; lower optim.lr or go back to an earlier checkpoint"
        )


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    """The part of the model that a checkpoint's tensors hang on, flat."""
    from dataclasses import asdict

    facts = asdict(recipe.model)
    free = ("router_aux_loss_coef", "router_bias_update_rate", "max_position_embeddings", "initializer_range",
            "bos_token_id", "eos_token_id", "pad_token_id", "chunk_size")  # fmt: skip
    flat = {f"model.{name}": value for name, value in facts.items() if name not in (*free, "mtp")}
    flat["model.pattern"] = recipe.model.layers
    flat["model.mtp.pattern"] = facts["mtp"]["pattern"]
    return json.loads(json.dumps(flat))


def _resume_from(run_dir: Path, recipe: Recipe, say) -> Path | None:
    """The checkpoint to go on from, or None for a new run; UserError where that would lose an old one."""
    found = newest_whole(run_dir, say)
    if found is None and (old := checkpoints(run_dir)):
        raise UserError(
            f"none of the {len(old)} checkpoints in {old[0].parent} is whole, and starting anew would replace them; "
            "move them away, or set another run_dir"
        )
    if found is None and recipe.resume_from:
        found = newest_whole(Path(recipe.resume_from), say)
        if found is None:
            raise UserError(f"resume_from: {recipe.resume_from} has no whole checkpoint to go on from")
    if found is not None:
        _refuse_other_model(found, recipe)
    return found


def _refuse_other_model(folder: Path, recipe: Recipe) -> None:
    saved, mine = read_state(folder)["model"], _model_facts(recipe)
    differ = [f"{k} is {mine.get(k)!r} and was {saved.get(k)!r}" for k in mine if mine.get(k) != saved.get(k)]
    if differ:
        raise UserError(
            f"{folder.parent.parent} holds a run of another model ({'; '.join(differ)}); set the old values again, or "
            "another run_dir"
        )


def _introduction(recipe: Recipe, world: World, model: HybridLM, loader: PackedLoader) -> str:
    from nemo_lite.check import parameter_counts, short

    counts = parameter_counts(recipe.model)
    kernels = ", ".join(f"{c['op']}={c['backend']}" for c in model.kernel_choices)
    return (
        f"{recipe.model.pattern}{f' + MTP {recipe.model.mtp.pattern}' if recipe.model.mtp.pattern else ''}: "
        f"{short(counts['total'])} parameters, {short(counts['active'])} active; {world.size} x {world.device.type}, "
        f"{recipe.train.dtype}; {short(recipe.tokens_per_step)} tokens a step of "
        f"{short(sum(loader.tokens_per_epoch))} an epoch; kernels: {kernels}{_emulated(model)}"
    )


def _emulated(model: HybridLM) -> str:
    """How many linears the native engine of number formats does not take, and why."""
    reasons: dict[str, int] = {}
    for why in model.numerics.refused.values():
        reasons[why] = reasons.get(why, 0) + 1
    words = "; ".join(f"{count} ({why})" for why, count in reasons.items())
    return f"; number formats emulated in {words}" if words else ""
