"""`prune`: a new module that runs the backbone with the plan's stages in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ztp_deploy import methods, models
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import StageModule, StageOutput
from ztp_deploy.models.base import Source
from ztp_deploy.plan import Plan, Stage, count_flops
from ztp_deploy.pruning.tokens import TokenState, initial_state, slots_of


@dataclass(frozen=True)
class Outputs:
    """Everything one pass can say.

    `logits` [B, classes]; per stage, `kept` [B, k] int32 original patch positions in slot order, and
    `scores`, the named tensors behind the selection.
    """

    logits: Tensor
    kept: list[Tensor]
    scores: list[dict[str, Tensor]]


class PrunedModel(nn.Module):
    """A backbone with pruning stages: images [B, 3, H, W] → logits [B, classes].

    Every count is a constant of `plan`; the batch is dynamic. `source` says what the backbone is.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.source: Source = models.source_of(model)
        self.plan = plan
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self.host = models.host_of(self.model)
        _check_fit(plan, self)
        options = methods.parse_options(plan.method, plan.options) if plan.stages else None
        self._stage_at: dict[int, tuple[Stage, str]] = {}
        self.stages = nn.ModuleDict()
        for stage in plan.stages:
            assert options is not None
            module = methods.get(plan.method).build_stage(stage, self.host.geometry, options)
            self.stages[f"block{stage.block}"] = module
            self._stage_at[stage.block] = (stage, f"block{stage.block}")
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → logits [B, classes]."""
        return self.run(images).logits

    def run(self, images: Tensor, kept_instead: Sequence[Tensor] | None = None) -> Outputs:
        """The same pass with what each stage kept and why.

        `kept_instead`, per stage original positions [B, k], takes the selection's place; the scores are still
        those the stages would have gone by.
        """
        host = self.host
        tokens = host.embed(images)
        state = initial_state(images, self.plan.patch_tokens)
        kept: list[Tensor] = []
        scores: list[dict[str, Tensor]] = []
        for number, block in enumerate(host.blocks, start=1):
            if number not in self._stage_at:
                tokens = block(tokens)
                continue
            stage, key = self._stage_at[number]
            forced = None if kept_instead is None else slots_of(kept_instead[len(kept)], state)
            out = self._run_stage(block, stage, self.stages[key], tokens, state, forced)
            tokens, state = out.tokens, out.state
            kept.append(state.positions)
            scores.append(out.scores)
        return Outputs(host.read_out(tokens, state), kept, scores)

    def _run_stage(
        self,
        block: nn.Module,
        stage: Stage,
        module: nn.Module,
        tokens: Tensor,
        state: TokenState,
        forced: Tensor | None,
    ) -> StageOutput:
        """A block with a stage after it. Only blocks whose stage asks for attention compute it openly.

        What the stage decides rests on attention alone and the MLP half acts token by token, so the tokens
        are dropped before it: the same result, without an MLP over tokens that are about to go.
        """
        assert isinstance(module, StageModule)
        attention = None
        if module.needs_attention:
            tokens, attention = self.host.attend(block, tokens)
        else:
            tokens = self.host.mix(block, tokens)
        out: StageOutput = module(tokens, state, attention, forced)
        return replace(out, tokens=self.host.transform(block, out.tokens))


def prune(model: nn.Module, plan: Plan) -> PrunedModel:
    """A new pruned module; the caller's model is left as it is.

    Raises BadRequest, with the reason, where the plan does not fit the model.
    """
    if not isinstance(model, nn.Module) or not isinstance(plan, Plan):
        raise BadRequest(
            f"prune takes a module and a Plan; {type(model).__name__} and {type(plan).__name__} came.",
            "Call ztp.load_model and ztp.make_plan first.",
        )
    return PrunedModel(model, plan)


def _check_fit(plan: Plan, pruned: PrunedModel) -> None:
    geometry = pruned.host.geometry
    wanted = {
        "image size": (plan.image_size, geometry.image_size),
        "patch tokens": (plan.patch_tokens, geometry.patch_tokens),
        "special tokens": (plan.special_tokens, geometry.special_tokens),
        "dense multiply-accumulates": (plan.flops.dense, count_flops(geometry, ()).dense),
    }
    wrong = [
        f"{what}: {asked} in the plan, {found} in the model"
        for what, (asked, found) in wanted.items()
        if asked != found
    ]
    beyond = [stage.block for stage in plan.stages if stage.block > geometry.depth]
    if beyond:
        wrong.append(f"stages at blocks {beyond}, but the model has {geometry.depth}")
    if wrong:
        raise BadRequest(
            f"The plan for {plan.model} does not fit {pruned.source.name}: {'; '.join(wrong)}.",
            f"Make one for it: ztp plan --model {pruned.source.name}.",
        )
    if plan.stages:
        places = {stage.place for stage in plan.stages}
        carried = {methods.get(plan.method).PLACE}
        if not places <= carried:
            raise BadRequest(
                f"Method {plan.method} acts at {', '.join(sorted(carried))}, the plan says {', '.join(sorted(places))}.",
                "Make the plan anew with `ztp plan`.",
            )
