"""Private inference: a decoder whose weights and prompt stay secret-shared between parties.

Every value is split into random shares, one a party, on a ring of 64-bit integers (fixed point, 18
bits of fraction); SecretFlow SPU computes on them. What each protocol assumes, what is public and
what leaks is said in the README.md beside this file. In short: parties follow the protocol and are
only curious; shapes and counts are public; the client alone learns the logits.
"""

from kvjax.infer.private.attention import OURS, PUBLISHED, Choice
from kvjax.infer.private.environment import environment_folder, setup
from kvjax.infer.private.lowering import Program, lower
from kvjax.infer.private.model import POLICIES, Policy, prepare
from kvjax.infer.private.run import add_generation, in_the_clear
from kvjax.infer.private.session import PARTIES, Job, Network, Outcome, PartyError, run_job

__all__ = [
    "OURS", "PARTIES", "POLICIES", "PUBLISHED", "Choice", "Job", "Network", "Outcome", "PartyError",
    "Policy", "Program", "add_generation", "environment_folder", "in_the_clear", "lower", "prepare",
    "run_job", "setup",
]  # fmt: skip
