"""Training on transformers.Trainer: from a config to a run directory that says all that is needed to repeat it."""

import math
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from ptv2 import records
from ptv2.answers import AnswerConfig, QuestionAnswerer
from ptv2.backbone import fast_dtype, load_tokenizer, resolve_backbone, weights_sha256
from ptv2.config import OPTIMIZERS, SCHEDULES, TrainingConfig
from ptv2.errors import InputError
from ptv2.features import MODEL_INPUTS, LengthGroupedSampler, collate, make_features
from ptv2.methods import build_model, count_parameters
from ptv2.metrics import score
from ptv2.model import SpanModel
from ptv2.pretraining import make_questions
from ptv2.squad import Example, draw_examples, examples_sha256, hold_out, load_examples
from ptv2.texts import load_texts

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
_BEFORE = {"optimizer": "adamw", "schedule": "linear"}  # what runs did that were begun before the config had these fields
_COMPLETE = "complete"  # written last into a training checkpoint: one without it was cut off by a kill


class QATrainer(Trainer):
    """Trainer that evaluates by answering, keeps only what is trained, and can be killed at any moment."""

    def __init__(self, model: SpanModel, config: TrainingConfig, answerer: QuestionAnswerer, dev: list[Example], **kwargs):
        super().__init__(model=model, **kwargs)
        self.config, self.answerer, self.dev = config, answerer, dev

    def _get_train_sampler(self, train_dataset=None) -> LengthGroupedSampler:
        # All processes together see the order that one process with the whole batch would see.
        whole_batch = self.config.batch_size * self.config.gradient_accumulation * self.args.world_size
        return LengthGroupedSampler(self.train_dataset["length"], whole_batch, self.config.seed)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            config, decayed = self.config, set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[float, float], list] = {}
            is_head = {name: name.startswith("qa_outputs.") for name in self.model.trained_names}
            for name in sorted(is_head, key=is_head.get):  # Trainer logs the rate of the first group: not the head's
                rate = config.head_learning_rate if is_head[name] else config.learning_rate
                key = rate, config.weight_decay * (name in decayed)
                groups.setdefault(key, []).append(self.model.get_parameter(name))
            optimiser, options = self.get_optimizer_cls_and_kwargs(self.args)
            grouped = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
            self.optimizer = optimiser(grouped, **options)
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Answer the held-out questions; EM and F1 in percent go to the log and decide which checkpoint is best."""
        predictions = self.answerer.predict_examples(self.dev)
        scores = score({e.id: p.best.text for e, p in zip(self.dev, predictions, strict=True)}, self.dev)
        metrics = {f"{metric_key_prefix}_exact_match": scores.exact_match.value, f"{metric_key_prefix}_f1": scores.f1.value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir=None, state_dict=None) -> None:
        path = Path(output_dir or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        save_file(self.model.trained_state(), path / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its own generator's state
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / _COMPLETE).touch()
            # Only now is an older one not needed any more; the newest and the best stay.
            rotate_checkpoints(self.args.output_dir, save_total_limit=2, best_model_checkpoint=self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.model.load_trained_state(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)

    def _load_best_model(self) -> None:
        self.model.load_trained_state(Path(self.state.best_model_checkpoint) / SAFE_WEIGHTS_NAME)


class _RunCallback(TrainerCallback):
    """Sees to it that a run that was killed, and perhaps moved since, goes on as if it had not been."""

    def __init__(self, run: Path, record: dict):
        self.run, self.record = run, record
        self.before, self.started = record["wall_seconds"], time.monotonic()

    def seconds(self) -> float:
        return round(self.before + time.monotonic() - self.started, 1)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        # With several processes, the loader that skips the steps already done does not pass the epoch on to the sampler.
        train_dataloader.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:  # the losses since the last log line are not in a checkpoint
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.record["wall_seconds"] = self.seconds()
            records.write_json(self.run / RUN_FILE, self.record)


def train(config: TrainingConfig, run: str | Path, command: str) -> dict:
    """Train into the directory `run`, or go on with a run that was cut off there.

    Args:
        command: that repeats this run, for the record.

    Returns:
        the record, as it stands in run.json; the trained weights lie beside it.

    Raises:
        InputError: bad data or options, or `run` holds something else.
    """
    run = Path(run)
    arguments = _arguments(config, run)  # starts the process group where there are several processes
    with arguments.main_process_first(local=False, desc="open the run"):
        record = _open_run(config, run)
    if record is not None and record["status"] == "finished":
        return record

    questions = read_questions(config)
    backbone = resolve_backbone(config.backbone)
    given = {
        "data": {name: {"questions": len(part), "sha256": examples_sha256(part)} for name, part in questions.items()},
        "backbone": {"name": backbone.name, "sha256": backbone.sha256},
        "dtype": str(fast_dtype(config.precision)).removeprefix("torch."),
    }
    checkpoint = config.prefix.checkpoint
    if checkpoint is not None:
        given["init"] = {"name": config.prefix.init, "sha256": weights_sha256(checkpoint)}
    if record is not None and {name: record[name] for name in given} != given:
        raise InputError(
            f"{run} was started on other data, another backbone's weights or in another precision than {given['dtype']}, or from "
            "another checkpoint's weights; give it those, or choose another directory."
        )
    set_seed(config.seed)
    records.reset_peak_memory()
    texts = sorted({example.context for example in questions["train"]})
    model = build_model(
        config.method, config.backbone, config.prefix, lora_rank=config.lora_rank, texts=texts, seed=config.seed,
        precision=config.precision,
    )  # fmt: skip
    tokenizer = load_tokenizer(backbone)
    with arguments.main_process_first(desc="tokenise"):  # the others find the cache
        features, _ = (make_features(part, tokenizer, config.windows) for part in questions.values())
    arguments.eval_steps = arguments.save_steps = _steps_between_evaluations(config, len(features), arguments.world_size)
    answers = AnswerConfig(allow_no_answer=any(example.is_impossible for example in questions["train"]))
    answerer = QuestionAnswerer(model, config.windows, answers)
    record = record or {
        "status": "running", "command": command, "config": config.to_dict(), "date": records.now(),
        "versions": records.versions(), "git_commit": records.git_commit(), "machine": records.machine(), **given,
        "parameters": asdict(count_parameters(model)), "windows": len(features), "wall_seconds": 0.0,
    }  # fmt: skip
    if arguments.process_index == 0:
        records.write_json(run / RUN_FILE, record)
    columns = [name for name in (*MODEL_INPUTS, "length") if name in features.column_names]
    callback = _RunCallback(run, record)
    trainer = QATrainer(
        model, config, answerer, questions["held_out"], args=arguments, train_dataset=features.select_columns(columns),
        eval_dataset=questions["held_out"], data_collator=partial(collate, tokenizer=tokenizer), callbacks=[callback],
    )  # fmt: skip
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # in a notebook, a table among the outputs; a bar on stderr everywhere
    trainer.add_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(run / CHECKPOINTS))
    trainer.accelerator.wait_for_everyone()  # all have loaded the best checkpoint before it is deleted
    if arguments.process_index == 0:
        model.save_pretrained(run, windows=asdict(config.windows), answers=asdict(answers))
        _finish(run, record, trainer, callback.seconds())
    return record


def read_questions(config: TrainingConfig) -> dict[str, list[Example]]:
    """The questions to train on, and those held out to pick the best checkpoint."""
    examples, dev = _made_questions(config) if config.pretraining else _written_questions(config)
    if config.max_train_questions:
        examples = draw_examples(examples, config.max_train_questions, config.seed)
    return {"train": examples, "held_out": dev}


def _made_questions(config: TrainingConfig) -> tuple[list[Example], list[Example]]:
    """From texts, which are held out before questions are made of them."""
    texts = load_texts(config.train_data, "train", config.pretraining.max_texts)
    if config.eval_data is None:
        texts, held_out = hold_out(texts, config.held_out)
    else:
        held_out = load_texts((config.eval_data,), "dev", config.pretraining.max_texts)
    return make_questions(texts, config.pretraining), make_questions(held_out, config.pretraining)


def _written_questions(config: TrainingConfig) -> tuple[list[Example], list[Example]]:
    examples = [example for source in config.train_data for example in _load_questions(config, source, "train")]
    _refuse_shared_ids(examples, config.train_data)
    if config.eval_data is None:
        return hold_out(examples, config.held_out)
    return examples, _load_questions(config, config.eval_data, "dev")


def _load_questions(config: TrainingConfig, source: str, split: str) -> list[Example]:
    examples = load_examples(source, split)
    if not config.answerable_only:
        return examples
    answerable = [example for example in examples if not example.is_impossible]
    if not answerable:
        raise InputError(f"{source} holds no answerable questions, and answerable_only is on; switch it off or give others.")
    return answerable


def _steps_between_evaluations(config: TrainingConfig, windows: int, processes: int) -> int:
    whole_batch = config.batch_size * config.gradient_accumulation * processes
    steps = config.max_steps or math.ceil(math.ceil(windows / whole_batch) * config.epochs)
    return math.ceil(steps / config.evaluations)


def _finish(run: Path, record: dict, trainer: QATrainer, seconds: float) -> None:
    """Complete the record of a run whose weights are saved, and delete what was kept for resuming it."""
    log = trainer.state.log_history
    best = max((entry for entry in log if "eval_f1" in entry), key=lambda entry: entry["eval_f1"])
    record.update(
        status="finished",
        finished=records.now(),
        wall_seconds=seconds,
        peak_memory_mib=round(records.peak_memory_mib(), 1),
        steps=trainer.state.global_step,
        log_history=log,
        metrics={"held_out_exact_match": best["eval_exact_match"], "held_out_f1": best["eval_f1"], "step": best["step"]},
    )
    record["parameters"]["stored_bytes"] = sum(file.stat().st_size for file in run.glob("*.safetensors"))
    records.write_json(run / RUN_FILE, record)
    shutil.rmtree(run / CHECKPOINTS)


def _open_run(config: TrainingConfig, run: Path) -> dict | None:
    """The record of a run begun in this directory with this config; None for a new or empty directory."""
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return None
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{run} exists and is not a run of ptv2; choose another output directory.")
    record = records.read_json(run / RUN_FILE)
    before, now = {**_BEFORE, **record.get("config", {})}, config.to_dict()
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        name = different[0]
        raise InputError(f"{run} holds a run with {name} = {before.get(name)}, not {now[name]}; choose another output directory.")
    return record


def _refuse_shared_ids(examples: list[Example], sources: tuple[str, ...]) -> None:
    seen = set()
    for example in examples:
        if example.id in seen:
            raise InputError(f"The question id {example.id} stands in more than one of {', '.join(sources)}; name each question once.")
        seen.add(example.id)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; those that a kill cut off are deleted."""
    whole = []
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (checkpoint / _COMPLETE).exists():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process of this run may be doing the same
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


def _arguments(config: TrainingConfig, run: Path) -> TrainingArguments:
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        warmup_steps=config.warmup,  # below 1 it is a share of all steps
        optim=OPTIMIZERS[config.optimizer],
        lr_scheduler_type=SCHEDULES[config.schedule],
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        # A frozen backbone is kept in its dtype; autocast is for one whose weights are trained.
        bf16=config.method in ("fine-tuning", "bitfit") and fast_dtype(config.precision) == torch.bfloat16,
        use_cpu=cpu,
        eval_strategy="steps",
        save_strategy="steps",
        logging_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="f1",
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
    )


def show_progress(batches: list) -> tqdm:
    """A bar over batches that are answered, on stderr."""
    return tqdm(batches, desc="answer", unit="batch")
