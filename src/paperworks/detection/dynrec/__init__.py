"""Referring expressions in as many steps of reasoning as they need: reasoner, halting policy, data."""

from .blocks import ReasoningBlock, ReasoningState, SubQueryBlock
from .boxes import paired_iou, rec_accuracy
from .data import Referred, ReferringData, flat_expressions, load_ref_reasoning, load_refer
from .expressions import FlatScene, FlatThing, draw_scenes, expressions2d, labelled_scenes, locate
from .halting import (
    episode_reward,
    greedy_steps,
    halting_distribution,
    ponder_loss,
    reinforce_loss,
    sample_steps,
)
from .model import (
    Answer,
    DynamicReasoner,
    FixedReasoner,
    GridTokens,
    Reasoning,
    StopPolicy,
    VisualTokens,
    pick,
)
from .text import TextEncoder, Vocabulary
from .training import GroundingLoss, PonderLoss, ReinforcedHalting, step_losses

__all__ = [
    "Answer",
    "DynamicReasoner",
    "FixedReasoner",
    "FlatScene",
    "FlatThing",
    "GridTokens",
    "GroundingLoss",
    "PonderLoss",
    "Reasoning",
    "ReasoningBlock",
    "ReasoningState",
    "Referred",
    "ReferringData",
    "ReinforcedHalting",
    "StopPolicy",
    "SubQueryBlock",
    "TextEncoder",
    "VisualTokens",
    "Vocabulary",
    "draw_scenes",
    "episode_reward",
    "expressions2d",
    "flat_expressions",
    "greedy_steps",
    "halting_distribution",
    "labelled_scenes",
    "load_ref_reasoning",
    "load_refer",
    "locate",
    "paired_iou",
    "pick",
    "ponder_loss",
    "rec_accuracy",
    "reinforce_loss",
    "sample_steps",
    "step_losses",
]
