"""Conversations and instructions as tokens with marks: what a line of JSON holds, the chat template, what is trained on, packing.

text.py's part for files of examples; text.py --help has what its user must know. An example becomes an array of ids with binfmt's marks:
NO_LOSS on each token that is not trained, and on the first one BEGINS too.
"""
import array
import bisect
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass

import binfmt  # before numpy: it says what to install where that is missing
import hf
import numpy as np
from binfmt import BEGINS, ID, NO_LOSS, Error, say

# The keys by which an example is known, the first that fit: Alpaca's own file has a "text" beside its instruction.
KINDS = {"input_ids": ["input_ids"], "messages": ["messages"], "conversations": ["conversations"], "prompt": ["prompt", "completion"],
         "instruction": ["instruction", "output"], "text": ["text"]}
# Others' keys that change what a model is to see or to say.
UNDONE = {**dict.fromkeys(("messages", "conversations", "prompt"), ["tools", "functions", "documents", "chat_template_kwargs"]),
          "instruction": ["system", "history"]}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}  # ShareGPT's "from"

ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{}\n\n{}### Response:\n")
ALPACA_INPUT = ", paired with an input that provides further context", "### Input:\n{}\n\n"

# ---- lines of JSON ---------------------------------------------------------------------------------

def lines(parts):
    held = []
    for block in parts:
        first, *others = block.split(b"\n")
        held.append(first)
        for line in others:
            yield b"".join(held)
            held = [line]
    yield b"".join(held)

def records(path, parts):
    """[(where, what stands there)] of a file with a JSON object a line, or with one list of them."""
    def parse(where, raw):
        try:
            return json.loads(raw.decode())
        except UnicodeDecodeError as e:
            raise Error(f"{where}: expected UTF-8, found byte 0x{raw[e.start]:02x}; convert the file (iconv)") from None
        except (ValueError, RecursionError) as e:
            raise Error(f"{where}: expected JSON, found something else: {str(e)[:200]}") from None

    parts = iter(parts)
    first = next(parts, b"").removeprefix(b"\xef\xbb\xbf")
    parts = itertools.chain([first], parts)
    if first.lstrip()[:1] == b"[":
        found = parse(path, b"".join(parts))
        yield from ((f"{path}: item {i}", item) for i, item in enumerate(found, 1))
    else:
        yield from ((f"{path}: line {i}", parse(f"{path}: line {i}", line)) for i, line in enumerate(lines(parts), 1) if line.strip())

def is_list(path):
    """Does a file begin as a JSON list does?"""
    with open(path, "rb") as f:
        return f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["

def kind_of_line(path):
    """The key by which the first line of a file is an example; None if it is none, or cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, "rb") as f:
        record = json.loads(f.readline(1 << 20))
        return next((kind for kind, keys in KINDS.items() if isinstance(record, dict) and all(key in record for key in keys)), None)

def string(where, record, key):
    if not isinstance(record[key], str):
        raise Error(f"{where}: {key}: expected a string, found {kind_of_json(record[key])}")
    return record[key]

def kind_of_json(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

def conversation(where, found):
    """The messages as templates want them, {"role", "content", ...}, and for each whether it may be trained on."""
    if not isinstance(found, list) or not found:
        raise Error(f"{where}: expected a list of messages, found {'an empty list' if found == [] else kind_of_json(found)}")
    messages, wanted = [], []
    for i, m in enumerate(found, 1):
        at = f"{where}: message {i}"
        if not isinstance(m, dict):
            raise Error(f"{at}: expected an object, found {kind_of_json(m)}")
        if m.get("tool_calls") or m.get("function_call"):
            raise Error(f"{at}: calls of tools are not done here")
        theirs = m.get("role") is None and "from" in m
        role, content = (m["from"], m.get("value")) if theirs else (m.get("role"), m.get("content"))
        if not isinstance(role, str) or theirs and role not in ROLES:
            raise Error(f"{at}: {'from' if theirs else 'role'}: expected one of {', '.join(ROLES) if theirs else 'system, user, assistant'}, "
                        f"found {printable(json.dumps(role))[:200]}")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            content = "\n".join(p["text"] for p in content)
        if not isinstance(content, str):
            raise Error(f"{at}: {'value' if theirs else 'content'}: expected a string{'' if theirs else ', or a list of parts of type text'}, found "
                        f"{'parts of another type' if isinstance(content, list) else kind_of_json(content)}")
        weight = m.get("weight")
        if weight not in (None, 0, 1):
            raise Error(f"{at}: weight: expected 0 or 1, found {printable(json.dumps(weight))[:200]}")
        more = {key: value for key, value in m.items() if key not in ("weight", "from", "value")}
        messages.append({**more, "role": ROLES[role] if theirs else role, "content": content})
        wanted.append(weight is None or bool(weight))
    return messages, wanted

# ---- chat templates --------------------------------------------------------------------------------

def environment():
    """jinja2's, with what transformers adds; its render() of {% generation %} notes in .spans where such blocks came to stand."""
    jinja2 = hf.library("jinja2", "a chat template")
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("span"), [], [], body).set_lineno(line)

        def span(self, caller):
            text, start = caller(), sum(map(len, self.environment.written))
            self.environment.spans.append((start, text))
            return text

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    now = datetime.datetime.now()  # once: all examples of a run get the same
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env.globals.update(raise_exception=raise_exception, strftime_now=now.strftime)
    env.written, env.spans = [], []
    return env

class Template:
    def __init__(self, source, path, names):
        """names: bos_token, eos_token and the like."""
        self.env, self.source, self.names, self.path = None, source, names, path
        self.generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def compile(self):
        """When the first conversation comes: other examples do without jinja2."""
        self.env = environment()
        try:
            self.template = self.env.from_string(self.source)
        except Exception as e:  # jinja2's, and a RecursionError
            raise Error(f"{self.path}: expected a chat template (Jinja), found something else: {printable(str(e))[:200]}") from None
        self.variables = {**self.template.globals, "tools": None, "documents": None, **self.names}

    def render(self, where, messages, prompt=False):
        """The text; with prompt it ends where an answer is to begin. env.spans then has the {% generation %} blocks."""
        if self.env is None:
            self.compile()
        self.env.written, self.env.spans = [], []
        variables = {**self.variables, "messages": messages, "add_generation_prompt": prompt}
        try:  # what template.generate() does, which takes longer to copy the globals than most templates take to render
            for part in self.template.root_render_func(self.template.new_context(variables, shared=True)):
                self.env.written.append(part)
        except MemoryError:
            raise
        except Exception as e:  # the template's own raise_exception(), or any error of what it computes
            raise Error(f"{where}: the chat template of {self.path} refuses it: {printable(str(e))[:300]}") from None
        return "".join(self.env.written)

def model_template(folder, file=None):
    """The Template of a model's directory, or of a file; None if there is none. folder may be None."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json") if folder else ():
        config.update(hf.read_json(os.path.join(folder, name)))
    source, path = config.get("chat_template"), folder and os.path.join(folder, "tokenizer_config.json")
    if isinstance(source, list):  # named ones
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    beside = folder and os.path.join(folder, "chat_template.jinja")
    if file or beside and os.path.isfile(beside):
        path = file or beside
        try:
            with open(path, encoding="utf-8") as f:
                source = f.read()
        except (OSError, ValueError) as e:
            raise Error(f"{path}: cannot read this template: {getattr(e, 'strerror', None) or e}") from None
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
             if key.endswith("_token") and (isinstance(value, str) or isinstance(value, dict) and isinstance(value.get("content"), str))}
    return Template(source, path, names) if isinstance(source, str) else None

# ---- from an example to its tokens -----------------------------------------------------------------

class Encoder:
    """Called with an example, returns its ids with marks; without a token, an empty array.

    note(where, what) takes what is worth a word. In examples, other than in plain texts, the name of a special token is that token,
    as it is in transformers; templates are made of them.
    """

    def __init__(self, tokenizer, template, kind="auto", train_on="answers", note=lambda where, what: None):
        self.tokenizer, self.template, self.kind, self.train_on, self.note = tokenizer, template, kind, train_on, note
        self.front, self.special = [], {tokenizer.eot}
        self.names = None  # of special tokens, as a pattern
        tok = tokenizer.library
        if tok is not None:
            if hasattr(tok, "encode_special_tokens"):
                tok.encode_special_tokens = False
            with_more, bare = (tok.encode("a", add_special_tokens=more).ids for more in (True, False))
            at = next((i for i in range(len(with_more)) if with_more[i:i + len(bare)] == bare), 0)
            self.front = with_more[:at]  # the BOS, for those that have one; what may stand behind is no part of a beginning
            special = {i: token.content for i, token in tok.get_added_tokens_decoder().items() if token.special}
            self.special.update(special)
            self.names = re.compile("|".join(map(re.escape, special.values()))) if special else None

    def __call__(self, where, record):
        if not isinstance(record, dict):
            raise Error(f"{where}: expected a JSON object, found {kind_of_json(record)}")
        kinds = [kind for kind in (KINDS if self.kind == "auto" else [self.kind]) if all(key in record for key in KINDS[kind])]
        kind = next((kind for kind in kinds if all(record[key] is not None for key in KINDS[kind])), kinds[0] if kinds else None)
        if kind is None:
            expected = ", or ".join(" and ".join(keys) for kind, keys in KINDS.items() if self.kind in ("auto", kind))
            raise Error(f"{where}: expected {expected}; found {'the keys ' * bool(record)}{printable(', '.join(record))[:200] or 'an empty object'}")
        for key in UNDONE.get(kind, ()):
            if record.get(key) not in (None, False, "", "[]", [], {}):
                raise Error(f"{where}: {key}: is not done here, and would be lost; remove it from the example if that is right")
        ids, trained = getattr(self, kind)(where, record)
        if len(ids) == 0:
            return np.zeros(0, np.uint32)
        ids = np.array(ids, np.uint32)
        if trained is not True and self.train_on != "all":
            ids[~trained] |= NO_LOSS
        ids[0] |= NO_LOSS | BEGINS
        return ids

    def tokenize(self, where, text):
        """Ids, and the characters [(from, to)] of each, or None from a tokenizer that does not tell."""
        tok = self.tokenizer
        try:
            if tok.library is None:
                return np.asarray(tok.encode(text.encode() if tok.raw else text)).tolist(), None
            found = tok.library.encode(text, add_special_tokens=False)
            return found.ids, found.offsets
        except (KeyboardInterrupt, MemoryError, binfmt.Stopped):
            raise
        except BaseException as e:  # a panic of tiktoken's or tokenizers' is no Exception
            if re.search("[\ud800-\udfff]", text):
                raise Error(f"{where}: has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
            raise Error(f"{where}: the tokenizer failed: {type(e).__name__}: {printable(str(e))[:200]}") from None

    def begun(self, ids, otherwise=()):
        return ids if self.front and ids[:len(self.front)] == self.front else [*(self.front or otherwise), *ids]

    def ended(self, ids):
        return ids if ids[-1:] == [self.tokenizer.eot] else [*ids, self.tokenizer.eot]

    # one method for each of KINDS: the ids, and an array of whether each is trained, or True

    def text(self, where, record):
        """A document. As in the files of plain texts the end of a text stands in front where there is no BOS."""
        ids, _ = self.tokenize(where, string(where, record, "text"))
        return (self.ended(self.begun(ids, () if ids[0] in self.special else [self.tokenizer.eot])), True) if ids else ([], True)

    def input_ids(self, where, record):
        ids, V = record["input_ids"], len(self.tokenizer.tokens)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < V for i in ids):
            raise Error(f"{where}: input_ids: expected a list of integers from 0 to {V - 1}, the vocabulary's last")
        ones = [1] * len(ids)
        given = {key: there if record.get(key) is None else record[key] for key, there in (
            ("labels", ids), ("attention_mask", ones), ("completion_mask", ones), ("assistant_masks", ones))}
        for key, values in given.items():
            if not isinstance(values, list) or len(values) != len(ids):
                raise Error(f"{where}: {key}: expected a list of {len(ids)} numbers, one for each of input_ids")
        labels, mask, *parts = given.values()
        for i, (token, label, there, *trained) in enumerate(zip(ids, labels, mask, *parts)):
            if label not in (-100, token):
                raise Error(f"{where}: labels: expected -100 or {token}, the token itself, at index {i}, found {printable(json.dumps(label))[:200]} "
                            "(labels are not shifted; the trainer does that)")
            if there not in (0, 1) or not there and label != -100 and labels is not ids:
                raise Error(f"{where}: attention_mask: expected 1, or 0 where labels have -100, at index {i}")
            if not all(part in (0, 1) for part in trained):
                raise Error(f"{where}: completion_mask, assistant_masks: expected 0 or 1, at index {i}")
        kept = [i for i, there in enumerate(mask) if there]
        return [ids[i] for i in kept], np.array([labels[i] != -100 and all(part[i] for part in parts) for i in kept], bool)

    def instruction(self, where, record):
        more = string(where, record, "input") if record.get("input") is not None else ""
        how, block = ALPACA_INPUT if more.strip() else ("", "")
        prompt = ALPACA.format(how, string(where, record, "instruction"), block.format(more))
        return self.pair(where, prompt, string(where, record, "output"))

    def prompt(self, where, record):
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            (before, _), (after, wanted) = conversation(f"{where}: prompt", prompt), conversation(f"{where}: completion", completion)
            return self.chat(where, before + after, [False] * len(before) + wanted)
        return self.pair(where, string(where, record, "prompt"), string(where, record, "completion"))

    def pair(self, where, prompt, completion):
        """Tokenized as one, or apart where a token would span the seam: the prompt's tokens are those that a model will be given."""
        ids, whole = (self.begun(self.tokenize(where, text)[0]) for text in (prompt, prompt + completion))
        answer = self.ended(whole[len(ids):] if whole[:len(ids)] == ids else self.tokenize(where, completion)[0])
        return [*ids, *answer], np.arange(len(ids) + len(answer)) >= len(ids)

    def messages(self, where, record):
        return self.chat(where, *conversation(where, record["messages"]))

    def conversations(self, where, record):
        messages, wanted = conversation(where, record["conversations"])
        if record.get("system"):  # some keep it beside
            messages, wanted = [{"role": "system", "content": string(where, record, "system")}, *messages], [False, *wanted]
        return self.chat(where, messages, wanted)

    def chat(self, where, messages, wanted):
        """The conversation rendered and tokenized as one text, so that there are no seams."""
        if self.tokenizer.library is None:
            raise Error(f"{where}: a conversation needs a model's tokenizer; name its directory, as in --tokenizer DIR")
        if self.template is None:
            raise Error(f"{where}: a conversation needs a chat template, and this tokenizer comes with none (chat_template in a directory's "
                        "tokenizer_config.json, or chat_template.jinja); give one with --template FILE, or write the examples as prompt and "
                        "completion or as instruction and output, which need none")
        text = self.template.render(where, messages)
        spans = [(start, start + len(inside)) for start, inside in self.template.env.spans]
        if any(text[slice(*span)] != inside for span, (_, inside) in zip(spans, self.template.env.spans)):
            raise Error(f"{where}: a {{% generation %}} block of the chat template ({self.template.path}) is written elsewhere than it stands, as inside "
                        "{% set %}, so there is no telling which tokens are its")
        for m in messages:
            if self.names and self.names.search(m["content"]):
                self.note(where, "a message has the name of a special token in it, which becomes that token, as in transformers")
            if m["content"].strip() not in text:
                self.note(where, "a message is left out or changed by the chat template")
        ids, offsets = self.tokenize(where, text)
        if self.train_on == "all":
            return ids, True
        trained = np.zeros(len(ids), bool)
        places = ids, [start for start, _ in offsets], [end for _, end in offsets]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        chosen = [i for i in answers[-1:] if wanted[i]] if self.train_on == "last" else [i for i in answers if wanted[i]]
        if not self.template.generation:
            if chosen[:1] == [0]:
                self.note(where, "begins with an answer, which is not trained on: a chat template does not tell where one without a question stands")
                del chosen[0]
            ranges = [self.answer(where, messages, i, text, *places) for i in chosen]
        elif len(spans) == len(answers) or len(chosen) == len(answers):
            ranges = [self.generated(where, span, text, *places) for i, span in itertools.zip_longest(answers, spans) if span and (i is None or i in chosen)]
        else:
            raise Error(f"{where}: found {len(spans)} {{% generation %}} blocks for {len(answers)} answers, so there is no telling which to leave out")
        for first, last in ranges:
            trained[first:last] = True
        return ids, trained

    def generated(self, where, span, text, ids, starts, ends):
        """The tokens of a {% generation %} block."""
        first, last = self.tokens_of(*span, text, ids, starts, ends)
        if not any(i in self.special for i in ids[first:last]):
            self.note(where, NO_END)
        return first, last

    def answer(self, where, messages, i, text, *places):
        """The tokens of message i: what the template adds for it after the prompt for an answer, to the end of its turn. Not the line
        end that many templates have there: it is no part of what a model has to say before it stops."""
        prompt = self.template.render(where, messages[:i], prompt=True)
        if not text.startswith(prompt):
            prompt = self.template.render(where, messages[:i])
            if not text.startswith(prompt):
                raise Error(f"{where}: message {i + 1}: the chat template writes the messages before this answer in another way when it is there, so "
                            "there is no telling what to train; --train-on all trains every token")
            self.note(where, "an answer does not begin as the chat template's prompt for one ends; trained from the end of the turn before")
        begin, content, (ids, starts, ends) = len(prompt), messages[i]["content"].strip(), places
        at = re.compile(r"\s*").match(text, begin).end()
        if text.startswith(content, at) and (content or prompt != self.template.render(where, messages[:i])):  # nearly always; then its end
            stop = bisect.bisect_right(ends, at + len(content))
            if stop < len(ids) and ids[stop] in self.special:
                return self.tokens_of(begin, ends[stop], text, *places)
        whole = text if i == len(messages) - 1 else self.template.render(where, messages[:i + 1])
        end = len(whole) if text.startswith(whole) else len(os.path.commonprefix([whole, text]))
        first, last = self.tokens_of(begin, end, text, *places)
        at = self.place(content, begin, end, text, *places)
        stops = [k for k in range(first, last) if ids[k] in self.special and starts[k] >= (begin if at < 0 else at + len(content))]
        if end < len(whole) and (at < 0 or not stops):
            raise Error(f"{where}: message {i + 1}: the chat template writes this answer in another way when messages follow it (some drop what was "
                        "thought), so there is no telling what to train; --train-on last trains the last answer alone, all every token")
        if not stops:
            self.note(where, NO_END)
            return first, last
        return first, (stops[0] if at >= 0 else stops[-1]) + 1

    def place(self, content, begin, end, text, ids, starts, ends):
        """Where an answer stands in text[begin:end], which may have its turn's header: the last place with a special token behind it, for
        an answer may be a word of the header (or nothing at all). Else the first; -1: nowhere."""
        at = text.rfind(content, begin, end)
        while at >= 0:
            stop = bisect.bisect_left(starts, at + len(content))
            while stop < len(ids) and not text[starts[stop]:ends[stop]].strip():
                stop += 1
            if stop < len(ids) and starts[stop] < end and ids[stop] in self.special:
                return at
            at = text.rfind(content, begin, at + len(content) - 1) if at + len(content) > begin else -1
        return text.find(content, begin, end)

    def tokens_of(self, begin, end, text, ids, starts, ends):
        """The tokens, from and to, that have a character of text[begin:end]; but not a special one before it that took the blanks after
        its name (rstrip)."""
        first, last = bisect.bisect_right(ends, begin), bisect.bisect_left(starts, end)
        return first + (first < last and ids[first] in self.special and bool(text[starts[first]:begin].strip())), last

NO_END = "the chat template puts no special token after an answer, so a model will not learn where to stop"

# ---- all examples ----------------------------------------------------------------------------------

class Examples:
    """What is known of each example that is kept, and how many are not."""

    def __init__(self):
        self.lengths, self.trained, self.hashes = array.array("i"), array.array("i"), array.array("Q")
        self.files = []  # how many come from each
        self.cut = self.cut_tokens = self.cut_trained = self.parted = 0
        self.dropped = {}  # why: how many

    def drop(self, why):
        self.dropped[why] = self.dropped.get(why, 0) + 1
        return None, why

    def keep(self, ids, T, too_long):
        """What is to be written of an example; or None, and the reason."""
        kept = ids[:T]
        targets, more = count_trained(kept), len(ids) - len(kept)
        if more and too_long == "split":
            self.parted += 1
            parts = [ids[i:i + T].copy() for i in range(0, len(ids), T)]
            for part in parts:
                part[0] |= NO_LOSS | BEGINS
            kept = [part for part, _ in (self.keep(part, T, too_long) for part in parts) if part is not None]
            return (np.concatenate(kept), None) if kept else (None, "without a trained token")
        why = ("empty" if len(ids) == 0 else f"longer than {T} tokens" if more and too_long == "drop" else None if targets else
               f"without a trained token among the first {T}" if count_trained(ids) else "without a trained token")
        if why:
            return self.drop(why)
        if more:
            self.cut, self.cut_tokens, self.cut_trained = self.cut + 1, self.cut_tokens + more, self.cut_trained + count_trained(ids) - targets
        self.lengths.append(len(kept)), self.trained.append(targets)
        self.hashes.append(int.from_bytes(hashlib.blake2b(kept.tobytes(), digest_size=8).digest(), "little"))
        return kept, None

def count_trained(ids):
    return np.count_nonzero(ids < BEGINS)

UNUSABLE, SAID = "that cannot be used", 5

def encode_examples(sources, encode, spool, T, too_long, unusable, show):
    """Writes the examples of [(path, its bytes in parts)] to the spool, and prints the first few; without a spool it stops there."""
    examples, seen, paths = Examples(), 0, []
    colour = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for path, parts in sources:
        before = len(examples.lengths)
        paths.append(path)
        for where, record in records(path, parts):
            if spool is None and seen == show:
                return examples
            try:
                whole = encode(where, record)
            except Error as e:
                if unusable == "stop":
                    raise Error(f"{e} (--unusable drop goes on without such examples)") from None
                seen += 1
                examples.drop(UNUSABLE)
                if examples.dropped[UNUSABLE] <= SAID:
                    say(f"dropped: {e}" + "; more of them are only counted" * (examples.dropped[UNUSABLE] == SAID))
                continue
            ids, why = examples.keep(whole, T, too_long)
            if seen < show:
                end = len(whole) if too_long == "split" else T
                more = f", {len(whole) - end} of them cut" * (len(whole) > end) + f"; dropped: {why}" * (why is not None)
                say(f"---- {where}: {len(whole)} tokens, {count_trained(whole)} trained{more}\n{shown(whole, end, encode.tokenizer.tokens, colour)}")
            seen += 1
            if spool and ids is not None:
                spool.write(ids.tobytes())
        examples.files.append(len(examples.lengths) - before)
    if not seen:
        raise Error(f"{' '.join(paths)[:200]}: expected examples, found none")
    if spool:
        spool.flush()
    return examples

def split(counts, fraction):
    """Whether each example goes to validation: the last ones of each file, as the tail of each text does."""
    val, start, owed = np.zeros(sum(counts), bool), 0, 0.0
    for count in counts:
        owed += fraction * count
        n = min(round(owed), count)
        start, owed = start + count, owed - n
        val[start - n:start] = True
    if fraction > 0 and not val.any():
        val[-1] = True
    if val.all():
        raise Error(f"examples with a token to train on: {len(val)}, too few to split; give more, or --val-fraction 0")
    return val

# ---- packing ---------------------------------------------------------------------------------------

def pack(lengths, T):
    """The row of T tokens of each example: the longest first, each into the fullest row that has room for it (best fit decreasing)."""
    rows = np.zeros(len(lengths), np.int64)
    room, having, count = [], {}, 0  # how much room rows have left, ascending; {room: rows}
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        at = bisect.bisect_left(room, n)
        if at < len(room):
            left = room[at]
            row = having[left].pop()
            if not having[left]:
                del having[left], room[at]
        else:
            left, row, count = T, count, count + 1
        rows[i], left = row, left - n
        if left and left not in having:
            bisect.insort(room, left)
            having[left] = []
        if left:
            having[left].append(row)
    return rows

def layout(lengths, T, packed, seed):
    """Examples row by row, with the rows shuffled: the order of the examples, and how many each row has."""
    rows = pack(lengths, T) if packed else np.arange(len(lengths))
    counts = np.bincount(rows)
    place = np.random.RandomState(seed).permutation(len(counts))  # the generator that NumPy keeps as it is
    return np.argsort(place[rows], kind="stable"), counts[np.argsort(place)]

def filled(read, starts, lengths, order, counts, T, pad):
    """Yields the rows: whole examples, then padding."""
    at = 0
    for n in counts.tolist():
        row, end = np.full(T, padding(pad), np.uint32), 0
        for i in order[at:at + n].tolist():
            row[end:end + lengths[i]] = read(int(starts[i]), int(lengths[i]))
            end += int(lengths[i])
        at += n
        yield row

def padding(token):
    """A document of its own, and no target."""
    return token | NO_LOSS | BEGINS

def of_a_file(rows, count, T, pad):
    """The rows of a file with `count` tokens, and the one that its last window ends with."""
    yield from itertools.islice(rows, count // T)
    yield np.array([padding(pad)], np.uint32)

@dataclass
class Part:
    """The training or the validation data."""
    stem: str
    hashes: object
    tokens: int
    trained: int
    rows: int
    filled: object  # yields them

def pack_examples(examples, val_fraction, read, T, packed, seed, pad):
    """The two Parts. read(start, count): tokens of the spool."""
    if not examples.lengths:
        raise Error(f"no example has a token to train on, so nothing is written (dropped: {reasons(examples)}); --show 3 shows the first three")
    lengths, trained, hashes = (np.frombuffer(a, a.typecode) for a in (examples.lengths, examples.trained, examples.hashes))
    starts, parts = np.cumsum(lengths, dtype=np.int64) - lengths, []
    val = split(examples.files, val_fraction)
    for stem, which in (("train", ~val), ("val", val)):
        n = lengths[which]
        order, counts = layout(n, T, packed, seed)
        parts.append(Part(stem, hashes[which], int(n.sum()), int(trained[which].sum()), len(counts),
                          filled(read, starts[which], n, order, counts, T, pad)))
    return parts

def reasons(examples):
    return ", ".join(f"{n:,} {why}" for why, n in examples.dropped.items()) or "none"

def say_table(examples, parts, T):
    train, val = parts
    columns = [part for part in parts if part.rows]
    for name, cell in (("", lambda p: p.stem), ("examples", lambda p: f"{len(p.hashes):,}"), ("tokens", lambda p: f"{p.tokens:,}"),
                       ("trained tokens", lambda p: f"{p.trained:,}"), (f"rows of {T}", lambda p: f"{p.rows:,}"),
                       ("padding", lambda p: f"{100 * (1 - p.tokens / (p.rows * T)):.1f} %"),
                       ("examples a row", lambda p: f"{len(p.hashes) / p.rows:.1f}")):
        say(f"{name:16}" + "".join(f"{cell(part):>16}" for part in columns))
    say(f"cut at {T} tokens: " + (f"{examples.cut:,}, by {examples.cut_tokens:,} tokens in all, {examples.cut_trained:,} of them trained" if examples.cut
                                  else "none"))
    if examples.parted:
        say(f"split into examples of {T} tokens: {examples.parted:,}")
    say(f"dropped: {reasons(examples)}")
    leaked = np.count_nonzero(np.isin(val.hashes, train.hashes))
    if leaked:
        say(f"in training and validation alike, token for token: {leaked:,} of validation's {len(val.hashes):,} examples; their loss examines nothing")

# ---- showing ---------------------------------------------------------------------------------------

def printable(text, keep=""):
    """What a terminal would act upon, written out."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

def shown(ids, T, tokens, colour):
    """An example for people: what is trained green, what is not dim, what is cut red; without colours {+trained+} and [-cut-]."""
    marks = [("\33[2m", "\33[0m"), ("\33[32m", "\33[0m"), ("\33[31m", "\33[0m")] if colour else [("", ""), ("{+", "+}"), ("[-", "-]")]
    kinds = np.where(np.arange(len(ids)) >= T, 2, np.where(ids & NO_LOSS, 0, 1)).tolist()
    out = []
    for kind, run in itertools.groupby(zip(kinds, (ids & ID).tolist()), lambda pair: pair[0]):
        text = b"".join(tokens[i] for _, i in run).decode(errors="replace")
        more = f"... and {len(text) - 2000} characters" if len(text) > 2000 else ""
        out.append(marks[kind][0] + printable(text[:2000], "\n") + more + marks[kind][1])
    return "".join(out)
