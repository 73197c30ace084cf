"""A small autoregressive policy, all of whose trajectories are enumerated: expectations are sums, gradients are exact.

Token 0 stops a trajectory; one that reaches the maximum length ends there. The logits after a prefix are a two-layer network
of fixed random features of (prompt, prefix): they depend on the whole prefix, and all prefixes *share* the parameters. (With a
table of logits the scores of different prefixes would be orthogonal, and Property 4.1 would hold for each trajectory alone.)
Rewards are drawn anew for every (prompt, trajectory). Everything is float64 and seeded.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from tic_megatron.algorithms import policy_objective

STOP = 0
INACTIVE = 1e9
"""An `eps_high` that no ratio reaches."""
FEATURES, HIDDEN = 6, 5

Prefix = tuple[int, ...]


class Environment:
    """Prompts (uniform), every prefix, every trajectory, and rewards.

    Rows are the (prompt, trajectory) pairs, n of them: `lengths` [n], `mask` [n, T], `prompt` [n], `rewards` [n];
    `responses[i]`: tokens of row i. `stop_logit` is added to the stop token's logit: below 0 for longer trajectories.
    """

    def __init__(self, seed: int, *, prompts: int = 3, vocabulary: int = 3, max_tokens: int = 4, stop_logit: float = 0.0):
        self.prompts, self.vocabulary, self.max_tokens = prompts, vocabulary, max_tokens
        self.bias = torch.zeros(vocabulary, dtype=torch.float64)
        self.bias[STOP] = stop_logit
        words = range(1, vocabulary)
        self.prefixes: list[Prefix] = [p for t in range(max_tokens) for p in product(words, repeat=t)]
        ends = [(*p, a) for p in self.prefixes for a in range(vocabulary) if self.ends((*p, a))]
        self.responses: list[Prefix] = ends * prompts
        self.prompt = torch.arange(prompts).repeat_interleave(len(ends))
        self.lengths = torch.tensor([len(r) for r in self.responses])
        self.mask = torch.arange(max_tokens) < self.lengths[:, None]
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(prompts, len(self.prefixes), FEATURES, generator=generator, dtype=torch.float64)
        self.rewards = torch.randn(len(self.responses), generator=generator, dtype=torch.float64)
        position = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.prefix_at = torch.zeros_like(self.mask, dtype=torch.long)
        self.token_at = torch.zeros_like(self.prefix_at)
        for i, response in enumerate(self.responses):
            for t, token in enumerate(response):
                self.prefix_at[i, t] = position[response[:t]]
                self.token_at[i, t] = token

    def ends(self, response: Prefix) -> bool:
        return response[-1] == STOP or len(response) == self.max_tokens

    def parameters(self, seed: int) -> Tensor:
        """A random policy, as a flat vector that requires gradients."""
        generator = torch.Generator().manual_seed(seed)
        size = FEATURES * HIDDEN + HIDDEN * self.vocabulary
        return torch.randn(size, generator=generator, dtype=torch.float64).mul_(0.6).requires_grad_()

    def log_policy(self, theta: Tensor) -> Tensor:
        """log pi(token | prompt, prefix), [prompts, prefixes, vocabulary]."""
        first = theta[: FEATURES * HIDDEN].view(FEATURES, HIDDEN)
        second = theta[FEATURES * HIDDEN :].view(HIDDEN, self.vocabulary)
        return torch.log_softmax(torch.tanh(self.features @ first) @ second + self.bias, dim=-1)

    def logprobs(self, theta: Tensor) -> Tensor:
        """log pi of each row's tokens [n, T], 0 outside the mask."""
        chosen = self.log_policy(theta)[self.prompt[:, None], self.prefix_at, self.token_at]
        return torch.where(self.mask, chosen, torch.zeros_like(chosen))

    def probabilities(self, theta: Tensor) -> Tensor:
        """Probability of each (prompt, trajectory) [n]; sums to 1."""
        return self.logprobs(theta).sum(dim=1).exp() / self.prompts

    def mean_rewards(self, theta: Tensor, rewards: Tensor | None = None) -> Tensor:
        """Each row's baseline: the expected reward of its prompt under the policy [n], without gradient."""
        rewards = self.rewards if rewards is None else rewards
        joint = (self.probabilities(theta) * rewards).detach() * self.prompts
        return torch.zeros(self.prompts, dtype=torch.float64).index_add(0, self.prompt, joint)[self.prompt]

    def scores(self, theta: Tensor) -> Tensor:
        """grad log pi of each token [n, T, parameters]; 0 outside the mask."""
        return torch.autograd.functional.jacobian(self.logprobs, theta.detach(), vectorize=True)


def policy_gradient(env: Environment, theta: Tensor, rewards: Tensor | None = None) -> Tensor:
    """Gradient of the expected reward at theta, by differentiating the sum itself."""
    rewards = env.rewards if rewards is None else rewards
    return torch.autograd.grad((env.probabilities(theta) * rewards).sum(), theta)[0]


def surrogate_gradient(env: Environment, theta: Tensor, theta_old: Tensor, rewards: Tensor | None = None) -> Tensor:
    """sum_t E_{prefix ~ old} sum_a grad pi_theta(a | prefix) Q_old(prefix, a), by recursion over prefixes."""
    rewards = env.rewards if rewards is None else rewards
    reward_of = {(p, r): rewards[i] for i, (p, r) in enumerate(zip(env.prompt.tolist(), env.responses, strict=True))}
    position = {prefix: i for i, prefix in enumerate(env.prefixes)}
    new, old = env.log_policy(theta).exp(), env.log_policy(theta_old).exp().detach()

    def visit(prompt: int, prefix: Prefix, reach: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        """(V_old of the prefix, the surrogate of the subtree below it); `reach`: probability of the prefix under old."""
        value, total = 0.0, 0.0
        for token in range(env.vocabulary):
            response, at = (*prefix, token), (prompt, position[prefix], token)
            if env.ends(response):
                q, below = reward_of[prompt, response], 0.0
            else:
                q, below = visit(prompt, response, reach * old[at])
            value = value + old[at] * q
            total = total + below + reach * new[at] * q
        return value, total

    total = sum(visit(prompt, (), 1.0 / env.prompts)[1] for prompt in range(env.prompts))
    return torch.autograd.grad(total, theta)[0]


def values(env: Environment, name: str, logprobs: Tensor, old: Tensor, advantages: Tensor, **options) -> list[Tensor]:
    """The objective of each row as a mini-batch of one trajectory: what one sample contributes."""
    options = {"max_response_tokens": env.max_tokens, "eps_low": 1 - 1e-9, "eps_high": INACTIVE, **options}
    return [
        policy_objective(name, logprobs[i : i + 1], old[i : i + 1], env.mask[i : i + 1], advantages[i : i + 1], **options)[0]
        for i in range(len(env.responses))
    ]


def expected_gradient(env: Environment, name: str, theta: Tensor, theta_old: Tensor, advantages: Tensor, **options) -> Tensor:
    """Expectation, over one trajectory sampled from the old policy, of the objective's gradient; clips inactive by default."""
    each = values(env, name, env.logprobs(theta), env.logprobs(theta_old).detach(), advantages, **options)
    weights = env.probabilities(theta_old).detach()
    return torch.autograd.grad((torch.stack(each) * weights).sum(), theta)[0]


def coefficients(name: str, logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, **options) -> Tensor:
    """d objective / d log pi(token) of a batch [n, T]: what multiplies each token's score in the gradient."""
    leaf = logprobs.detach().requires_grad_()
    value, _ = policy_objective(name, leaf, old.detach(), mask, advantages, **options)
    return torch.autograd.grad(value, leaf)[0]


def score_weights(env: Environment, theta: Tensor, theta_old: Tensor) -> dict[str, Tensor]:
    """What multiplies each token's score in one trajectory's gradient for an advantage of 1, without the length [n, T].

    `none`: 1. `grpo2`, `tic_grpo`: the objectives' own, uncapped and `... capped` at 1.28. `root`: sqrt(W).
    """
    ones = torch.ones(len(env.responses), dtype=torch.float64)
    batch = (env.logprobs(theta), env.logprobs(theta_old), env.mask, ones)

    def own(name: str, eps: float) -> Tensor:  # times n: the mean over the batch, undone
        return coefficients(name, *batch, max_response_tokens=1, eps_high=eps) * len(env.responses)

    weights = {"none": env.mask.double(), "root": own("tic_grpo", INACTIVE).sqrt()}
    for name in ("grpo2", "tic_grpo"):
        weights |= {name: own(name, INACTIVE), f"{name} capped": own(name, 0.28)}
    return weights


def squared_norms(scores: Tensor, weights: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """The two sides of Property 4.1: (E |sum_t w_t s_t|^2, sum_t E |w_t s_t|^2); `scores` [n, T, parameters]."""
    weighted = scores * weights[:, :, None]
    whole = weighted.sum(dim=1).square().sum(dim=1)
    tokens = weighted.square().sum(dim=(1, 2))
    return (probabilities @ whole).item(), (probabilities @ tokens).item()


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()
