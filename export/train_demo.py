"""Trains the packaged demo checkpoint on phantoms: seeded, resumable after a kill, from nothing but its recipe.

Run as `make demo-checkpoint`. The state lies in `--work`; running again continues from the last saved step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.calibration.pool import LabelledFrame, PhantomPool, phantom_pool
from sonoedge.calibration.scores import score_pool
from sonoedge.export.balance import balance_loss
from sonoedge.export.demo_card import Training, write_card
from sonoedge.export.demo_tokenizer import train_tokenizer, write_tokenizer
from sonoedge.export.dense_heads import DenseHeads, VisionTap
from sonoedge.export.evaluate import FIRST_FRAME_SEED, open_model, print_accuracy
from sonoedge.export.lessons import branches
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, save_checkpoint
from sonoedge.export.packing import IGNORE, Packer
from sonoedge.export.schedule import warm_cosine
from sonoedge.export.teacher_recipe import Phase, TeacherRecipe, load_teacher_recipe
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

SAVE_EVERY_STEPS = 100
EVALUATION_FRAMES = 1000
RECIPE = Path(__file__).parent / "recipes" / "demo-teacher.toml"
CHECKPOINT = Path(__file__).parent / "demo_checkpoint"


class Trainer:
    """The model, its heads and its optimiser, saved together so that a killed run continues where it was."""

    def __init__(self, recipe: TeacherRecipe, work: Path, tokenizer: Tokenizer, spec: ImageSpec) -> None:
        self.recipe, self.work, self.spec = recipe, work, spec
        self.tokenizer = tokenizer
        config = recipe.model_config(len(tokenizer), tokenizer)
        self.model = init_model(config, recipe.seed)
        self.tap = VisionTap(self.model)
        torch.manual_seed(recipe.seed)
        self.heads = DenseHeads(config.vision.embed_dim, config.hidden_size)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.97), weight_decay=0.05, fused=True)
        self.done_steps = {"vision": 0, "joint": 0}
        self.seconds = 0.0

    def restore(self) -> None:
        """Continue from the last saved step, if there is one."""
        path = self.work / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.done_steps, self.seconds = state["done_steps"], state["seconds"]

    def save(self) -> None:
        """Write the state so that a kill at any moment leaves the old one or the new one."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "done_steps": self.done_steps,
            "seconds": self.seconds,
        }
        temporary = self.work / "state.tmp"
        torch.save(state, temporary)
        temporary.replace(self.work / "state.pt")

    def run(self, name: str, phase: Phase, pool: PhantomPool, packer: Packer | None) -> None:
        """Train one phase to its end; without a packer only the vision tower learns, from the dense targets."""
        first, log = self.done_steps[name], (self.work / "log.jsonl").open("a")
        with track(f"train {name}", phase.steps) as advance, log:
            advance(first)
            for step in range(first, phase.steps):
                started = time.monotonic()
                for group in self.optimiser.param_groups:
                    group["lr"] = learning_rate(phase, step)
                rng = np.random.default_rng([self.recipe.seed, len(name), step])
                frames = draw(pool, phase.batch, rng)
                with dropped_layers(self.model, phase.layer_drop, rng):
                    losses = self.losses(frames, packer, rng)
                loss = torch.stack([weight * value for weight, value in losses.values()]).sum()
                loss.backward()
                nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                self.done_steps[name] = step + 1
                self.seconds += time.monotonic() - started
                values = {key: round(float(value.detach()), 4) for key, (_, value) in losses.items()}
                if step % 10 == 9:
                    print(
                        json.dumps({"phase": name, "step": step + 1, "seconds": round(self.seconds), **values}),
                        file=log,
                        flush=True,
                    )
                advance(1, " ".join(f"{key} {value:.3f}" for key, value in values.items()))
                if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == phase.steps:
                    self.save()

    def losses(
        self, frames: list[LabelledFrame], packer: Packer | None, rng: np.random.Generator
    ) -> dict[str, tuple[float, Tensor]]:
        """Every loss of one step with its weight."""
        patches = [frame.patches(self.spec) for frame in frames]
        values = torch.from_numpy(np.concatenate([item.values for item in patches]))  # [B·patches, 1176]
        features, embeds = self.tap.encode(values, [item.grid for item in patches])
        dense = self.heads(features, embeds, frames)
        if packer is None:
            return {"dense": (1.0, dense)}
        joint = self.recipe.joint
        packed = packer.pack([branches(frame.truth, rng) for frame in frames], context=self.recipe.model.context)
        rows = packed.labels != IGNORE  # [B, S]
        output = self.model(
            packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=packed.attention_bias,
            logits_rows=rows, collect_router=True,
        )  # fmt: skip
        answers = functional.cross_entropy(output.logits, packed.labels[rows])
        return {
            "answers": (1.0, answers),
            "dense": (joint.dense_weight, dense),
            "balance": (joint.balance_weight, balance_loss(output.router_logits, self.recipe.model.experts_per_token)),
        }


def learning_rate(phase: Phase, step: int) -> float:
    """The rate of `step` in a phase."""
    return phase.learning_rate * warm_cosine(step, steps=phase.steps, warmup_steps=phase.warmup_steps)


def draw(pool: PhantomPool, batch: int, rng: np.random.Generator) -> list[LabelledFrame]:
    """Draw frames of the pool, half of them mirrored."""
    indices = rng.integers(len(pool), size=batch)
    return [pool.mirrored(int(i)) if rng.random() < 0.5 else pool[int(i)] for i in indices]


@contextmanager
def dropped_layers(model: EchoVLM, probability: float, rng: np.random.Generator) -> Iterator[None]:
    """Leave whole layers out of a step, the first and the last of each stack excepted (LayerDrop, arXiv 1909.11556)."""
    vision, decoder = model.visual.blocks, model.model.layers
    model.visual.blocks, model.model.layers = _kept(vision, probability, rng), _kept(decoder, probability, rng)
    try:
        yield
    finally:
        model.visual.blocks, model.model.layers = vision, decoder


def _kept(layers: nn.ModuleList, probability: float, rng: np.random.Generator) -> nn.ModuleList:
    inner = range(1, len(layers) - 1)
    return nn.ModuleList(layer for i, layer in enumerate(layers) if i not in inner or rng.random() >= probability)


def train(recipe: TeacherRecipe, work: Path) -> tuple[EchoVLM, float]:
    """Train the teacher that `recipe` describes; returns it with the seconds spent in training steps."""
    work.mkdir(parents=True, exist_ok=True)
    spec = recipe.image_spec()
    pool = phantom_pool(work / "frames", recipe.frames, first_seed=recipe.first_frame_seed, spec=spec)
    if not (work / "tokenizer.json").exists():
        write_tokenizer(train_tokenizer(pool.truths[:4000], recipe.vocabulary, recipe.seed), work)
    tokenizer = Tokenizer.from_file(work / "tokenizer.json")
    trainer = Trainer(recipe, work, tokenizer, spec)
    trainer.restore()
    trainer.run("vision", recipe.vision, pool, None)
    grid = pool[0].patches(spec).grid
    trainer.run("joint", recipe.joint, pool, Packer(tokenizer, [grid], spec))
    return trainer.model, trainer.seconds


def main() -> None:
    """Train, write the checkpoint, evaluate what was written on fresh phantoms and add its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--work", type=Path, default=Path("build/demo-teacher"))
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    recipe, work, out = load_teacher_recipe(arguments.recipe), arguments.work, arguments.out
    model, seconds = train(recipe, work)
    fresh = work / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    save_checkpoint(
        model,
        fresh,
        dtype=torch.bfloat16,
        tokenizer_files_from=work,
        preprocessor={"max_pixels": recipe.model.image_pixels},
    )
    # Evaluated as stored: bfloat16 rounds the weights, and the card speaks of the checkpoint, not of the run.
    session, tokenizer = open_model(fresh)
    pool = phantom_pool(work / "evaluation", EVALUATION_FRAMES, first_seed=FIRST_FRAME_SEED, spec=session.image)
    scored = score_pool(session, tokenizer, pool, "score")
    write_card(fresh, recipe, Training(sum(p.numel() for p in model.parameters()), seconds / 60), scored)
    print_accuracy({"all frames": scored.accuracy(), **scored.strata()}, f"{EVALUATION_FRAMES} fresh phantoms")
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(fresh, out)


if __name__ == "__main__":
    main()
