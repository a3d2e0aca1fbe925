"""``given``, ``settings`` and ``st`` of hypothesis; where it is not installed, fixed pseudo-random draws instead.

A GPU machine may have nothing but torch and pytest. The fallback has the strategies that the tests of ``tests/ops``
use, draws ``max_examples`` times from a generator seeded by the test's name, and does not shrink: what was drawn when a
test failed is printed.
"""

from __future__ import annotations

import functools
import inspect
import random
import types

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class Strategy:
        """Something to draw: a function of a ``random.Random``."""

        def __init__(self, draw):
            self.draw = draw

        def __or__(self, other):
            return Strategy(lambda r: r.choice((self, other)).draw(r))

    class Data:
        """What ``st.data()`` gives: draws while the test runs."""

        def __init__(self, generator):
            self.generator, self.drawn = generator, []

        def draw(self, strategy, label=None):
            self.drawn.append(strategy.draw(self.generator))
            return self.drawn[-1]

        def __repr__(self):
            return f"data {self.drawn}"

    def integers(low, high):
        """The ends more often than the rest, for that is where things break."""
        return Strategy(lambda r: r.choice((low, high)) if r.random() < 0.2 else r.randint(low, high))

    def floats(low, high):
        return Strategy(lambda r: r.choice((low, high)) if r.random() < 0.2 else r.uniform(low, high))

    def sampled_from(values):
        return Strategy(lambda r: r.choice(list(values)))

    def tuples(*strategies):
        return Strategy(lambda r: tuple(s.draw(r) for s in strategies))

    def lists(elements, *, min_size=0, max_size=5):
        return Strategy(lambda r: [elements.draw(r) for _ in range(r.randint(min_size, max_size))])

    def composite(fn):
        return lambda *args: Strategy(lambda r: fn(lambda strategy: strategy.draw(r), *args))

    st = types.SimpleNamespace(
        integers=integers,
        floats=floats,
        sampled_from=sampled_from,
        tuples=tuples,
        lists=lists,
        composite=composite,
        booleans=lambda: sampled_from((False, True)),
        none=lambda: sampled_from((None,)),
        data=lambda: Strategy(Data),
    )

    def given(**strategies):
        """Decorator: the test runs ``max_examples`` times with drawn arguments of these names."""

        def decorate(test):
            @functools.wraps(test)
            def run(*args, **kwargs):
                generator = random.Random(test.__qualname__)
                for n in range(run.max_examples):
                    drawn = {name: s.draw(generator) for name, s in strategies.items()}
                    try:
                        test(*args, **kwargs, **drawn)
                    except BaseException:
                        print(f"draw {n} of {test.__name__}: {drawn}")
                        raise

            signature = inspect.signature(test)
            kept = [p for p in signature.parameters.values() if p.name not in strategies]
            run.__signature__ = signature.replace(parameters=kept)  # pytest fills in these alone
            run.max_examples = 10
            return run

        return decorate

    def settings(*, max_examples=10, **_):
        """Decorator above ``given``: how often to draw; hypothesis' other settings mean nothing here."""

        def decorate(run):
            run.max_examples = max_examples
            return run

        return decorate


__all__ = ["given", "settings", "st"]
