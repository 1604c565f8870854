"""Short instructions whose answers a program can check: small sums and differences, and tasks about words.

    python3 dev/bench/instructions.py --out DIR [--train 800] [--test 200] [--seed 1] [--kinds sum,join]

writes DIR/train.jsonl and DIR/test.jsonl, lines of {"messages": [...], "kind": ...} for prepro/text.py. The same seed gives the same
files, and no question of the test is trained on. score() counts right answers. Meant for models as small as SmolLM2-135M; with its
template an example has about 30 tokens, so 8 fit into a row of 256. The system's message stands there because SmolLM2's template would
put a longer one.
"""
import argparse
import json
import os
import random
import sys

from common import ROOT  # noqa: F401: it makes prepro importable
import binfmt
from atomic import atomic

WORDS = """apple arm baby ball bank bear bell bird blue boat body bone book bread brick bus cake camp car cat chair city clock cloud coat
coin cold cook corn cow crown cup dance day desk dog door dream drum duck ear earth egg eye face farm fire fish flag floor flower food
foot forest fork fox fruit garden gate girl glass gold goat grape grass green hair hall hand hat heart hill home honey horse house ice
iron island jacket juice key king kite knife lake lamp leaf leg lemon letter light lion map milk mirror money moon mouse music nail name
neck nest night nose ocean onion orange paint paper park pear pen piano plane plant plate poem queen rain red ring river road rock roof
room rope rose salt sand school sea seed seven sheep ship shoe silver sky snow soap song soup spoon star stone storm street sugar summer
sun table tail tea tiger tooth tower town train tree truck uncle village voice wall water wheel wind window winter wolf wood yellow""".split()

SYSTEM = "Answer in one word."

def number(rng):
    return rng.randint(1, 20)

def larger(rng):
    a, b = rng.sample(range(1, 100), 2)
    return f"Maximum: {a} or {b}", str(max(a, b))

def difference(rng):
    a, b = number(rng), number(rng)
    return f"{a + b} - {b} =", str(a)

def total(rng):
    a, b = number(rng), number(rng)
    return f"{a} + {b} =", str(a + b)

def count(rng):
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    return f"How many {letter} in {word}?", str(word.count(letter))

def joined(rng):
    a, b = rng.sample(WORDS, 2)
    return f"Join: {a} {b}", a + b

def of_a_word(question, answer):
    def task(rng):
        word = rng.choice(WORDS)
        return question.format(word), answer(word)
    return task

KINDS = {"sum": total, "difference": difference, "larger": larger, "count": count, "join": joined,
         "reverse": of_a_word("Reverse: {}", lambda w: w[::-1]), "last": of_a_word("Last letter: {}", lambda w: w[-1]),
         "capitals": of_a_word("Capitals: {}", str.upper), "sort": of_a_word("Sort letters: {}", lambda w: "".join(sorted(w)))}

def examples(n, seed, kinds=tuple(KINDS)):
    """n examples with as many of each kind, no two of them alike."""
    rng, found, made = random.Random(seed), [], set()
    for i in range(n):
        kind = kinds[i % len(kinds)]
        for _ in range(1000):
            question, answer = KINDS[kind](rng)
            if question not in made:
                break
        else:
            raise binfmt.Error(f"{n} examples: there are not so many different ones of the kind {kind}; ask for fewer")
        made.add(question)
        roles = {"system": SYSTEM, "user": question, "assistant": answer}
        found.append({"messages": [{"role": role, "content": content} for role, content in roles.items()], "kind": kind})
    rng.shuffle(found)
    return found

def score(answers, asked):
    """{kind: (right, asked)}, and "all". answers: what a model said to each of `asked`, lines of test.jsonl; blanks around do not count."""
    if len(answers) != len(asked):
        raise ValueError(f"expected {len(asked)} answers, found {len(answers)}")
    found = {}
    for answer, example in zip(answers, asked):
        for kind in (example["kind"], "all"):
            right, n = found.get(kind, (0, 0))
            found[kind] = right + (answer.strip() == example["messages"][-1]["content"]), n + 1
    return found

def work(a):
    made = examples(a.train + a.test, a.seed, a.kinds)
    paths = [os.path.join(a.out, name) for name in ("train.jsonl", "test.jsonl")]
    with binfmt.writing(a.out):
        os.makedirs(a.out, exist_ok=True)
        with atomic(*paths) as files:
            for f, part in zip(files, (made[:a.train], made[a.train:])):
                f.write("".join(json.dumps(example) + "\n" for example in part).encode())
    binfmt.say(f"wrote {paths[0]}: {a.train} examples, {paths[1]}: {a.test}, of {len(a.kinds)} kinds")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR")
    for name, n in (("train", 800), ("test", 200), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=n, metavar="N", help=f"({n})")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="A,B", help=f"of {','.join(KINDS)} (all)")
    a = parser.parse_args()
    a.kinds = a.kinds.split(",")
    if not set(a.kinds) <= set(KINDS):
        parser.error(f"--kinds {','.join(a.kinds)}: expected some of {','.join(KINDS)}")
    if min(a.train, a.test) < 1:
        parser.error("--train and --test: expected 1 or more")
    binfmt.run("instructions.py", lambda: work(a))

if __name__ == "__main__":
    main()
