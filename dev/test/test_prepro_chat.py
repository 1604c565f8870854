"""Tests of prepro/text.py for examples (prepro/chat.py): kinds of input, chat templates, masks, packing, what is said; dev/bench/instructions.py.

Tokenizers are made here, of bytes and the names of special tokens, so that each character is a token and a mask can be read."""
import contextlib
import io
import json
import os
import random
import re
import struct
import sys
from unittest import mock

import numpy as np
import pytest

from helpers import ROOT, header, library, script

sys.path[:0] = [str(ROOT / "prepro"), str(ROOT / "dev/bench")]
import binfmt  # noqa: E402
import chat  # noqa: E402
import instructions  # noqa: E402
import text  # noqa: E402

# ---- templates, in the manner of those that models come with ---------------------------------------

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {
    # SmolLM2's own; its bos_token is not its beginning of a text
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant "
               "named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
               "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
              "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
              "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}"
              "{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
              "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
              "{% if loop.index0 == 0 and system != false %}"
              "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
              "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
              "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
               "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
    "qwen2.5": "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n"
               "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n"
               "{%- for message in messages %}\n    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or "
               "(message.role == \"assistant\") %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
               "    {%- endif %}\n{%- endfor %}\n"
               "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
              "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
              "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
              "{% endif %}\n{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
             "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
             "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    # the end of a text behind the last turn alone
    "phi3": "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "generation": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
                  "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
                  "{% endfor %}"
                  "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
ENDS = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "mistral": "</s>", "qwen2.5": "<|im_end|>", "zephyr": "</s>",
        "gemma": "<end_of_turn>", "phi3": "<|end|>", "generation": "<|im_end|>"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>",
           "<|end|>", "<start_of_turn>", "<end_of_turn>"]

def tokenizer_of_bytes(merges=(), processor=None):
    tokenizers = library("tokenizers")
    alphabet = [*SPECIAL, *text.byte_alphabet(), *("".join(m) for m in merges)]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(alphabet)}, merges=list(merges)))
    tok.pre_tokenizer, tok.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    if processor:
        tok.post_processor = processor(tokenizers.processors)
    return tok

def with_bos_and_eos(processors):
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])

def model(folder, template=None, tok=None, **config):
    folder.mkdir(exist_ok=True)
    (tok or tokenizer_of_bytes()).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **({"chat_template": template} if template else {})}))
    return folder

def encoder(folder, notes=None, **how):
    library("jinja2")
    tok = text.make_tokenizer(str(folder))
    return chat.Encoder(tok, chat.model_template(str(folder), how.pop("file", None)), note=(lambda where, what: notes.append(what)) if notes is not None
                        else lambda *_: None, **how)

def decoded(encode, ids):
    return b"".join(encode.tokenizer.tokens[i] for i in (ids & (2**30 - 1)).tolist()).decode()

def trained(encode, ids):
    """The stretches of text that are targets."""
    assert ids.dtype == np.uint32 and ids[0] >> 30 == 3 and not (ids[1:] >> 30 & 1).any(), "it begins once, and there is no target"
    found, open_ = [], False
    for i in ids:
        target = i >> 31 == 0
        if target and not open_:
            found.append([])
        if target:
            found[-1].append(i)
        open_ = target
    return [decoded(encode, np.array(run, np.uint32)) for run in found]

USER, HELLO, MORE, FINE = ({"role": role, "content": content} for role, content in (
    ("user", "Hi there"), ("assistant", "Hello \U0001f600\nyou"), ("user", "And now?"), ("assistant", "Fine.")))
TALK = [USER, HELLO, MORE, FINE]
SYSTEM = {"role": "system", "content": "Be kind"}

@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_and_tokenized_as_in_transformers(tmp_path, name):
    transformers = library("transformers")
    encode = encoder(model(tmp_path / "m", TEMPLATES[name], tokenizer_of_bytes(processor=with_bos_and_eos)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for messages in (TALK, TALK[:2], [SYSTEM, *TALK], [*TALK, USER], [{**USER, "content": "</s> <b>&amp;\r\n\t\u2028 "}, HELLO]):
        if name == "gemma" and messages[0] == SYSTEM:
            with pytest.raises(binfmt.Error, match="a: line 1: the chat template of .*tokenizer_config.json refuses it: System role not supported"):
                encode("a: line 1", {"messages": messages})
            continue
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=name == "generation")
        ids = encode("a", {"messages": messages})
        assert (ids & binfmt.ID).tolist() == found["input_ids"]
        if name == "generation":
            assert (ids >> 31 == 0).tolist() == [bool(m) for m in found["assistant_masks"]]

def test_the_whole_language_of_templates(tmp_path):
    """tojson without HTML's escapes, loop controls, blanks of blocks, named templates, chat_template.jinja, tokens by name, strftime_now."""
    jinja = ("  {% for m in messages %}\n    {% if m.role == 'tool' %}{% continue %}{% endif %}\n{{ m | tojson }}|{{ messages | tojson(indent=1) }}\n"
             "    {%- break %}\n  {% endfor %}\n{{ strftime_now('%Y') }}{{ bos_token }}{{ pad_token }}{{ tools is none }}{{ nonesuch }}</s>")
    folder = model(tmp_path / "m", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": jinja}], pad_token="<|end|>", unk_token=None)
    messages = [{"role": "tool", "content": "x"}, {"role": "user", "content": "<a> & '\u00e9'", "more": {"a": None}}]
    encode = encoder(folder, train_on="all")
    theirs = library("transformers").AutoTokenizer.from_pretrained(folder)
    assert (encode("a", {"messages": messages}) & binfmt.ID).tolist() == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    (folder / "chat_template.jinja").write_text("beside</s>")
    (tmp_path / "t").write_text("given</s>")
    for file, expected in ((None, "beside</s>"), (str(tmp_path / "t"), "given</s>")):
        encode = encoder(folder, file=file, train_on="all")
        assert decoded(encode, encode("a", {"messages": messages})) == expected
    with pytest.raises(binfmt.Error, match="none: cannot read this template: No such file"):
        chat.model_template(None, str(tmp_path / "none"))
    (tmp_path / "t").write_text("{% if %}")
    with pytest.raises(binfmt.Error, match="t: expected a chat template .Jinja., found something else: Expected an expression"):
        chat.model_template(None, str(tmp_path / "t")).render("a", [])

# ---- masks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_the_end_of_their_turn_are_trained(tmp_path, name):
    """And nothing else: not the header of an answer, nor the line end after it, nor the end of a user's turn."""
    notes, end = [], ENDS[name]
    encode = encoder(model(tmp_path / "m", TEMPLATES[name]), notes)
    first, last = (f" {HELLO['content']} {end}", f" Fine. {end}") if name == "llama2" else (HELLO["content"] + end, "Fine." + end)
    for front in ([], [SYSTEM])[:1 if name == "gemma" else 2]:
        assert trained(encode, encode("a", {"messages": [*front, *TALK]})) == [first, last]
        assert trained(encode, encode("a", {"messages": [*front, *TALK, USER]})) == [first, last]
        assert trained(encode, encode("a", {"messages": [*front, USER, {**HELLO, "weight": 0}, MORE, {**FINE, "weight": 1}]})) == [last]
    assert trained(encode, encode("a", {"messages": [USER]})) == []
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert trained(encode, encode("a", {"messages": [{"role": "user", "content": parts}, FINE]})) == [last]
    assert trained(encode, encode("a", {"prompt": TALK[:3], "completion": [FINE]})) == [last], "answers of the prompt are given, not learnt"
    assert trained(encode, encode("a", {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Fine."}]})) == [last]
    encode.train_on = "last"
    assert trained(encode, encode("a", {"messages": TALK})) == [last]
    assert trained(encode, encode("a", {"messages": [*TALK[:3], {**FINE, "weight": 0}]})) == []
    encode.train_on = "all"
    ids = encode("a", {"messages": TALK})
    assert len(trained(encode, ids)) == 1 and np.count_nonzero(ids >> 31) == 1
    assert notes == []

THINKS = ("{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and not loop.last %}"
          "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def test_a_template_that_changes_earlier_turns(tmp_path):
    """As Qwen3's, which drops earlier thoughts, and puts an empty one into the last turn."""
    thinks = THINKS.replace("m.role + '\n' +", "m.role + '\n' + ('<think></think>' if loop.last and m.role == 'assistant' else '') +")
    empty = encoder(model(tmp_path / "e", thinks + "{% if not add_generation_prompt %}</s>{% endif %}"))
    assert trained(empty, empty("a", {"messages": TALK})) == [HELLO["content"] + "<|im_end|>", "<think></think>Fine.<|im_end|>"]
    encode = encoder(model(tmp_path / "m", THINKS))
    thought = {"role": "assistant", "content": "<think>so</think>Yes"}
    assert trained(encode, encode("a", {"messages": [USER, thought]})) == ["<think>so</think>Yes<|im_end|>"]
    assert trained(encode, encode("a", {"messages": TALK})) == [HELLO["content"] + "<|im_end|>", "Fine.<|im_end|>"]
    with pytest.raises(binfmt.Error, match="a: line 7: message 2: the chat template writes this answer in another way when .*--train-on last .* all"):
        encode("a: line 7", {"messages": [USER, thought, MORE, FINE]})
    encode.train_on = "last"
    assert trained(encode, encode("a", {"messages": [USER, thought, MORE, FINE]})) == ["Fine.<|im_end|>"]
    prompts = encoder(model(tmp_path / "p", THINKS.replace("assistant\n{%", "assistant\n<think>{%")))
    with pytest.raises(binfmt.Error, match="message 2: the chat template writes this answer in another way"):
        prompts("a", {"messages": [USER, {**thought, "content": "So</think>Yes"}, MORE, FINE]})
    counts = encoder(model(tmp_path / "n", "{{ messages | length }}" + CHATML))
    with pytest.raises(binfmt.Error, match="message 2: the chat template writes the messages before this answer in another way"):
        counts("a", {"messages": TALK[:2]})

def test_odd_templates_are_said(tmp_path):
    """A generation prompt that is not what an answer begins with; none; no end of a turn; a message that is left out; names in a message."""
    notes = []
    encode = encoder(model(tmp_path / "a", CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")), notes)
    assert trained(encode, encode("a", {"messages": [{**USER, "content": "Fine."}, FINE]})) == ["<|im_start|>assistant\nFine.<|im_end|>"]
    assert notes.pop().startswith("an answer does not begin as the chat template's prompt") and not notes
    encode = encoder(model(tmp_path / "b", CHATML.split("{% if")[0]), notes)
    assert trained(encode, encode("a", {"messages": TALK[2:]})) == ["<|im_start|>assistant\nFine.<|im_end|>"] and not notes
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    encode = encoder(model(tmp_path / "c", plain), notes)
    assert trained(encode, encode("a", {"messages": TALK})) == [HELLO["content"] + "\n", "Fine.\n"]
    assert notes == [chat.NO_END] * 2
    notes.clear()
    encode = encoder(model(tmp_path / "d", CHATML.replace("messages %}", "messages if message.role != 'system' %}")), notes)
    encode("a", {"messages": [SYSTEM, *TALK]})
    assert notes.pop() == "a message is left out or changed by the chat template" and not notes
    encode("a", {"messages": [{**USER, "content": "a </s> b"}, FINE]})
    assert notes.pop().startswith("a message has the name of a special token in it") and not notes
    assert trained(encode, encode("a", {"messages": [HELLO, USER, FINE]})) == ["Fine.<|im_end|>"]
    assert notes.pop().startswith("begins with an answer, which is not trained on") and not notes
    twice = encoder(model(tmp_path / "e", TEMPLATES["generation"].replace("{% generation %}", "{% generation %}.{% endgeneration %}{% generation %}")), notes)
    assert trained(twice, twice("a", {"messages": TALK[:2]})) == ["." + HELLO["content"] + "<|im_end|>"]
    with pytest.raises(binfmt.Error, match="found 4 {% generation %} blocks for 2 answers"):
        twice("a", {"messages": [USER, {**HELLO, "weight": 0}, MORE, FINE]})
    held = "{% set x %}{% generation %}{{ messages[1].content }}</s>{% endgeneration %}{% endset %}{{ messages[0].content + x }}"
    inside = encoder(model(tmp_path / "f", held), notes)
    with pytest.raises(binfmt.Error, match="a {% generation %} block of the chat template .* is written elsewhere than it stands"):
        inside("a", {"messages": TALK[:2]})

@pytest.mark.parametrize("answer", ["a", "assistant", "t", "t a", ""])
def test_an_answer_that_stands_in_its_header_too(tmp_path, answer):
    """Where a template has no prompt for an answer the turn's header is trained on as well, and is not taken for the answer."""
    encode = encoder(model(tmp_path / "m", TEMPLATES["llama3"].split("{% if add_generation_prompt")[0]))
    turn = "<|start_header_id|>assistant<|end_header_id|>\n\n" + answer + "<|eot_id|>"
    assert trained(encode, encode("a", {"messages": [USER, {**FINE, "content": answer}, MORE, {**FINE, "content": answer}]})) == [turn] * 2

@pytest.mark.parametrize("strip", ["rstrip", "lstrip"])
def test_special_tokens_that_take_the_blanks_beside_them(tmp_path, strip):
    """As Phi-3's <|assistant|>, whose token ends within an answer that begins with a line end: it is no part of the answer."""
    tok = json.loads(tokenizer_of_bytes().to_str())
    for token in tok["added_tokens"]:
        token[strip] = True
    encode = encoder(model(tmp_path / "m", TEMPLATES["phi3"], library("tokenizers").Tokenizer.from_str(json.dumps(tok))))
    for content in ("\nFine.", "Fine.", " Fine.\n", ""):
        found = trained(encode, encode("a", {"messages": [USER, {**FINE, "content": content}, MORE, {**FINE, "content": content}]}))
        assert ["".join(run.split()) for run in found] == [content.strip() + "<|end|>"] * 2

def test_blanks_and_seams_of_tokens(tmp_path):
    """Offsets without blanks (ByteLevel's trim_offsets), a token across the seam of prompt and answer, characters of several tokens."""
    merges = [("\u0120", "F"), ("\u010a", "\u010a")]
    tok = tokenizer_of_bytes(merges, lambda processors: processors.ByteLevel(trim_offsets=True))
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    encode = encoder(model(tmp_path / "m", template, tok))
    answer = {"role": "assistant", "content": "Fine \n\n \u00e9\U0001f600 \n\n"}
    assert trained(encode, encode("a", {"messages": [USER, answer, USER, FINE]})) == [" " + answer["content"] + "</s>", " Fine.</s>"]
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    encode = encoder(model(tmp_path / "p", plain, tok))
    assert trained(encode, encode("a", {"messages": [USER, FINE, USER]})) == [" Fine.\n"]
    encode = encoder(model(tmp_path / "n", CHATML, tok))
    assert trained(encode, encode("a", {"messages": [USER, answer, USER, FINE]})) == [answer["content"] + "<|im_end|>", "Fine.<|im_end|>"]

def test_a_tokenizer_of_sentencepiece(tmp_path):
    """As Llama 2's: a blank in front, blanks as \u2581, bytes of what is not in the vocabulary."""
    tokenizers = library("tokenizers")
    vocab = {name: i for i, name in enumerate(["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a"])}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    tok.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tok.add_special_tokens(["<s>", "</s>", "<unk>"])
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encode = encoder(model(tmp_path / "m", TEMPLATES["llama2"], tok))
    ids = encode("a", {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "a\u4e16 b"}] * 2})
    assert [run.strip() for run in trained(encode, ids)] == ["a\u4e16 b </s>"] * 2 and (ids & binfmt.ID).tolist().count(0) == 2
    assert trained(encode, encode("a", {"prompt": "a", "completion": "b"})) == ["b</s>"], "no blank between them"

# ---- kinds that need no template -------------------------------------------------------------------

@pytest.mark.parametrize("processor, bos", [(None, []), (with_bos_and_eos, [0])], ids=["plain", "bos"])
def test_beginnings_and_ends_are_there_once(tmp_path, processor, bos):
    """A BOS if the tokenizer adds one, and no second; the tokenizer's own EOS never, ours after an answer, once."""
    encode = encoder(model(tmp_path / "m", None, tokenizer_of_bytes(processor=processor)))
    letters = {c: encode.tokenizer.library.token_to_id(c) for c in "abc"}
    a, b, c = letters.values()

    def has(record, ids, targets, **how):
        found = encode("a", record)
        assert (found & binfmt.ID).tolist() == ids and (found >> 31 == 0).tolist() == [i in targets for i in range(len(ids))]
    n = len(bos)
    for prompt in ("ab", "<s>" * n + "ab"):
        for completion in ("c", "c</s>"):
            has({"prompt": prompt, "completion": completion}, [*bos, a, b, c, 1], (n + 2, n + 3))
    has({"prompt": "", "completion": "c"}, [*bos, c, 1], range(1, n + 2))
    front = bos or [1]
    for document in ("ab", "ab</s>"):
        has({"text": document}, [*front, a, b, 1], (1, 2, 3))
    has({"text": "<|im_start|>a"}, [*bos, 2, a, 1], range(1, n + 3))
    assert len(encode("a", {"text": ""})) == 0

def test_prompts_and_completions_are_tokenized_as_one(tmp_path):
    """As in TRL; but where a token would span the seam the prompt keeps the tokens that a model will be given."""
    tokenizers = library("tokenizers")
    tok = tokenizer_of_bytes([("b", "c")])
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    encode = encoder(model(tmp_path / "m", None, tok))
    for completion, expected in (("d", ["d</s>"]), (" d", [" d</s>"]), ("c", [" c</s>"]), ("", ["</s>"])):
        ids = encode("a", {"prompt": "ab", "completion": completion})
        assert trained(encode, ids) == expected and [encode.tokenizer.tokens[i & 2**30 - 1] for i in ids[:3].tolist()] == [b" ", b"a", b"b"]

def test_keys_that_are_null_are_not_there(tmp_path):
    """As exports of tables have them, in which every line has every key."""
    encode = encoder(model(tmp_path / "m", CHATML))
    null = dict.fromkeys(("input_ids", "labels", "attention_mask", "messages", "conversations", "prompt", "completion", "tools", "text", "completion_mask"))
    more = {"weight": None, "tool_calls": None, "from": None, "value": None}
    assert trained(encode, encode("a", {**null, "messages": [{**USER, **more}, {**FINE, **more}]})) == ["Fine.<|im_end|>"]
    theirs = [{"role": None, "content": None, "from": who, "value": m["content"]} for who, m in (("human", USER), ("gpt", FINE))]
    assert trained(encode, encode("a", {**null, "conversations": theirs})) == ["Fine.<|im_end|>"]
    assert trained(encode, encode("a", {**null, "prompt": "a", "completion": "b"})) == ["b</s>"]
    assert [i >> 31 for i in encode("a", {**null, "input_ids": [5, 6]}).tolist()] == [1, 0]

def test_alpaca(tmp_path):
    encode = encoder(model(tmp_path / "m"))
    plain = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
             "### Instruction:\nAdd.\n\n### Response:\n")
    paired = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately "
              "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {} 2\n\n### Response:\n")
    for more, prompt in (({}, plain), ({"input": ""}, plain), ({"input": None}, plain), ({"input": "1 {} 2"}, paired)):
        ids = encode("a", {"instruction": "Add.", **more, "output": "3", "text": "all of it once more"})
        assert decoded(encode, ids) == prompt + "3</s>" and trained(encode, ids) == ["3</s>"]

def test_tokens_that_are_given(tmp_path):
    encode = encoder(model(tmp_path / "m"))

    def targets(record):
        ids = encode("a: line 1", {"input_ids": [5, 6, 7, 8], **record})
        return [int(i) if i < 2**30 else -1 for i in ids]
    assert targets({"labels": [-100, -100, 7, 8]}) == [-1, -1, 7, 8], "of the token itself, not shifted"
    assert targets({}) == [-1, 6, 7, 8] and targets({"labels": [5, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}) == [-1, 6, 7]
    assert targets({"attention_mask": [0, 1, 1, 1]}) == [-1, 7, 8]
    assert targets({"completion_mask": [0, 0, 1, 1]}) == [-1, -1, 7, 8] and targets({"assistant_masks": [1, 1, 1, 0]}) == [-1, 6, 7, -1]
    assert targets({"labels": [5, 6, -100, 8], "completion_mask": [0, 1, 1, 0]}) == [-1, 6, -1, -1] and targets({"attention_mask": [0] * 4}) == []
    for record, what in (({"labels": [6, 7, 8, -100]}, "expected -100 or 5, the token itself, at index 0, found 6 .labels are not shifted"),
                         ({"labels": [-100] * 3}, "labels: expected a list of 4 numbers"), ({"attention_mask": "x"}, "attention_mask: expected a list"),
                         ({"completion_mask": [1]}, "completion_mask: expected a list of 4"), ({"assistant_masks": [1, 1, 2, 1]}, "expected 0 or 1, at index 2"),
                         ({"attention_mask": [1, 1, 1, 2]}, "attention_mask: expected 1, or 0 where labels have -100, at index 3"),
                         ({"attention_mask": [1, 1, 1, 0], "labels": [5, 6, 7, 8]}, "at index 3"), ({"input_ids": [1, 999]}, "integers from 0 to 268"),
                         ({"input_ids": [True]}, "integers from 0"), ({"input_ids": 5}, "integers from 0")):
        with pytest.raises(binfmt.Error, match=f"a: line 1: .*{what}"):
            targets(record)

@pytest.mark.parametrize("line, what", [
    ('{"messages": [', "expected JSON, found something else"), ("[1]", "expected a JSON object, found a list"), ("{}", "found an empty object"),
    ('{"prompt": "a", "chosen": "b"}', "found the keys prompt, chosen"), ('{"a\\u001b": 1}', r"found the keys a\x1b"), ("nul", "expected JSON"),
    ('{"messages": []}', "expected a list of messages, found an empty list"), ('{"messages": "x"}', "found a string"),
    ('{"messages": [3]}', "message 1: expected an object"),
    ('{"messages": [{"content": "x"}]}', "role: expected one of system, user, assistant, found null"),
    ('{"messages": [{"role": "user", "content": null}]}', "content: expected a string, or a list of parts of type text, found null"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "found parts of another type"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "calls of tools are not done"),
    ('{"messages": [], "tools": [1]}', "tools: is not done here, and would be lost"),
    ('{"conversations": [], "tools": "[{}]"}', "tools: is not done here"),
    ('{"instruction": "a", "output": "b", "history": [1]}', "history: is not done here"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 2}]}', "weight: expected 0 or 1, found 2"),
    ('{"conversations": [{"from": "narrator", "value": "x"}]}', 'from: expected one of human, user, gpt, assistant, system, found "narrator"'),
    ('{"prompt": "x", "completion": []}', "completion: expected a string, found a list"), ('{"text": 3}', "text: expected a string, found a number"),
    ('{"text": "\\ud83d"}', "half of a surrogate pair"), ('{"instruction": "a", "output": null}', "output: expected a string, found null"),
    ("[" * 100000, "expected JSON"), ('{"text": "\xff"}', "expected UTF-8, found byte 0xff")], ids=range(24))
def test_a_broken_line_is_named(tmp_path, line, what):
    library("jinja2")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin-1") + b'\n{"text": "fine"}\n')
    with pytest.raises(binfmt.Error) as e:
        text.prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), str(model(tmp_path / "m", CHATML)))
    said = str(e.value)
    assert said.startswith(f"{tmp_path}/a.jsonl: line 3: ") and what in said and said.isprintable() and names(tmp_path / "out") == []

# ---- the whole way: files, packing, what is said ---------------------------------------------------

def rows_of(path, T, eot=1):
    """By struct: checks the header and the padding, and returns the examples of each row."""
    raw = path.read_bytes()
    count, = struct.unpack_from("<8xi", raw)
    assert raw[:1024] == header(20240801, 8, count) and len(raw) == 1024 + 4 * count and count % T == 1
    ids, pad = struct.unpack(f"<{count}I", raw[1024:]), 3 << 30 | eot
    assert ids[-1] == pad
    rows = []
    for r in range(0, count - 1, T):
        examples = []
        for i in ids[r:r + T]:
            if i >> 30 & 1:
                assert i >> 31
                examples.append([])
            examples[-1].append(i)
        while examples[-1] == [pad]:
            examples.pop()
        assert [pad] not in examples
        rows.append(examples)
    return rows

def lines_of(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

def names(folder):
    return sorted(os.listdir(folder))

def run(*args, status=0):
    """text.py in this process, which takes a tenth of the time. Returns its output, or what it says as it ends."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["text.py", *map(str, args)]), contextlib.redirect_stdout(out):
        try:
            text.main()
        except SystemExit as e:
            assert status == 1 and e.code.startswith("text.py: ") and e.code.isprintable()
            return e.code
    assert status == 0
    return out.getvalue()

def prepare(path, folder, out, *more, **how):
    return run(path, "--tokenizer", folder, "--out", out, *more, **how)

def test_masks_survive_packing(tmp_path):
    """Every example is whole in one row, with its own marks; the last tenth of each file is in val.bin; the same seed gives the same files."""
    library("jinja2")
    rng, T, folder = random.Random(1), 100, model(tmp_path / "m", CHATML)
    encode, files = encoder(folder), []
    for name, n in (("a.jsonl", 150), ("b.jsonl", 40)):
        records = []
        for i in range(n):
            word = f"{name}{i}" + "x" * rng.randrange(20)
            records.append(rng.choice([{"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]},
                                       {"prompt": word, "completion": "y" * rng.choice([1, 150])},
                                       {"input_ids": [40] * (i + 1) + [i + 13, 7], "labels": [-100] * (i + 1) + [i + 13, -100]}]))
        files.append((lines_of(tmp_path / name, records), records))
    said = run(*(path for path, _ in files), "--tokenizer", folder, "--out", tmp_path / "out", "-t", T)
    whole = [[encode("a", record).tolist()[:T] for record in records] for _, records in files]
    whole = [[ids for ids in part if any(i < 2**30 for i in ids)] for part in whole]
    tails = [round(len(part) / 10) for part in whole]
    expected = {"val": [ids for part, n in zip(whole, tails) for ids in part[-n:]], "train": [ids for part, n in zip(whole, tails) for ids in part[:-n]]}
    for stem, examples in expected.items():
        rows = rows_of(tmp_path / f"out/{stem}.bin", T)
        assert sorted(ids for row in rows for ids in row) == sorted(examples)
        tokens = sum(map(len, examples))
        assert len(rows) < 1.2 * tokens / T
        table = {line[:16].strip(): line[16:].split() for line in said.splitlines() if line[:15].strip()}
        column = ["train", "val"].index(stem)
        for name, value in (("examples", len(examples)), ("tokens", tokens), ("trained tokens", sum(i < 2**30 for ids in examples for i in ids)),
                            ("rows of 100", len(rows))):
            assert table[name][column] == f"{value:,}", name
    assert re.search(r"^cut at 100 tokens: \d+, by [\d,]+ tokens in all, [\d,]+ of them trained$", said, re.M)
    assert re.search(r"^dropped: \d+ without a trained token among the first 100$", said, re.M)
    assert said.endswith("rows have 100 tokens, so the trainer's -t is 100, no other\nto train a small model on it:\n./train_gpt2 -e gpt2:L4,H4,C128,T100,V269 "
                         f"-i {tmp_path}/out/train.bin -j {tmp_path}/out/val.bin -b 4 -t 100\n")
    before = (tmp_path / "out/train.bin").read_bytes()
    for more, same in (([], True), (["--seed", 2], False)):
        run(*(path for path, _ in files), "--tokenizer", folder, "--out", tmp_path / "out", "-t", T, *more)
        assert ((tmp_path / "out/train.bin").read_bytes() == before) == same
    run(*(path for path, _ in files), "--tokenizer", folder, "--out", tmp_path / "one", "-t", T, "--no-pack", "--val-fraction", 0)
    assert [len(row) for row in rows_of(tmp_path / "one/train.bin", T)] == [1] * sum(map(len, whole)) and not (tmp_path / "one/val.bin").exists()
    run(*(path for path, _ in files), "--tokenizer", folder, "--out", tmp_path / "out", "-t", T, "--shard-tokens", 1000)
    shards = [name for name in names(tmp_path / "out") if name.startswith("train_")]
    rows = [rows_of(tmp_path / "out" / name, T) for name in shards]
    assert len(shards) > 1 and max(map(len, rows)) <= 9 and not (tmp_path / "out/train.bin").exists()
    assert sorted(ids for part in rows for row in part for ids in row) == sorted(expected["train"])
    assert "expected 101 or more, a row and the token after it" in prepare(files[0][0], folder, tmp_path / "out", "-t", T, "--shard-tokens", 100, status=1)

@pytest.mark.parametrize("seed", range(4))
def test_best_fit_decreasing(seed):
    """Against the same in two loops."""
    rng = np.random.RandomState(seed)
    T = [64, 1000, 7, 4096][seed]
    lengths = rng.randint(1, T + 1, 700).astype(np.int32) if seed % 2 else np.minimum(rng.geometric(4 / T, 700), T).astype(np.int32)
    rows = chat.pack(lengths, T)
    full = np.bincount(rows, lengths)
    left = []
    for n in sorted(lengths.tolist(), reverse=True):
        fits = [k for k in range(len(left)) if left[k] >= n]
        if fits:
            left[min(fits, key=lambda k: left[k])] -= n
        else:
            left.append(T - n)
    assert sorted(full) == sorted(T - k for k in left) and full.max() <= T
    order, counts = chat.layout(lengths, T, True, 5)
    assert sorted(order) == list(range(700)) and counts.sum() == 700 and len(counts) == len(left)
    ends = np.cumsum(counts)
    assert all(len(set(rows[order[end - n:end]])) == 1 for n, end in zip(counts, ends))
    assert len(left) < 9 or rows[order[ends - 1]].tolist() != sorted(rows[order[ends - 1]]), "rows are shuffled"

def test_nothing_is_cut_silently(tmp_path):
    library("jinja2")
    folder = model(tmp_path / "m", CHATML)
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [USER, {**FINE, "content": "x" * 500}]}, {"messages": [{**USER, "content": "y" * 500}, FINE]},
                                           {"messages": TALK}, {"messages": [USER]}, {"text": ""}])
    said = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0)
    lost = len(encoder(folder)("a", {"messages": [USER, {**FINE, "content": "x" * 500}]})) - 200
    assert (f"\ncut at 200 tokens: 1, by {lost} tokens in all, {lost - 1} of them trained\n"
            "dropped: 1 without a trained token among the first 200, 1 without a trained token, 1 empty\n") in said
    assert sorted(len(ids) for row in rows_of(tmp_path / "out/train.bin", 200) for ids in row)[-1] == 200
    said = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0, "--too-long", "drop")
    assert "cut at 200 tokens: none\ndropped: 2 longer than 200 tokens, 1 without a trained token, 1 empty\n" in said
    assert [len(row) for row in rows_of(tmp_path / "out/train.bin", 200)] == [1]

def test_long_texts_are_split(tmp_path):
    """With --too-long split no token is lost: each part is a document of its own, and a part without a trained token is dropped."""
    library("jinja2")
    folder = model(tmp_path / "m", CHATML)
    long = "".join(chr(97 + i % 26) for i in range(450))
    path = lines_of(tmp_path / "a.jsonl", [{"text": long}, {"text": "short"}, {"messages": [{**USER, "content": "y" * 500}, FINE]}])
    whole = [encoder(folder)("a", record) for record in ({"text": long}, {"text": "short"}, {"messages": [{**USER, "content": "y" * 500}, FINE]})]
    said = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0, "--too-long", "split")
    assert "cut at 200 tokens: none\nsplit into examples of 200 tokens: 2\ndropped: 2 without a trained token\n" in said
    found = [ids for row in rows_of(tmp_path / "out/train.bin", 200) for ids in row]
    parts = [ids[i:i + 200] for ids in whole for i in range(0, len(ids), 200)]
    kept = [part for part in parts if chat.count_trained(part)]
    assert len(kept) == len(parts) - 2 == 5
    assert sorted([i & chat.ID for i in ids] for ids in found) == sorted((part & chat.ID).tolist() for part in kept)
    shown = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0, "--too-long", "split", "--show", 1)
    assert "cut;" not in shown and "[-" not in shown

def test_unusable_examples_stop_or_are_counted(tmp_path):
    """A template that refuses, a role that nobody knows, no content: the line is named; --unusable drop goes on, says the first, counts all."""
    library("jinja2")
    folder = model(tmp_path / "m", TEMPLATES["llama2"])
    bad = [{"messages": [USER, USER, FINE]}, {"conversations": [{"from": "observation", "value": "x"}]}, {"messages": [{**USER, "content": None}, FINE]}]
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [USER, FINE]}, *bad * 3, {"messages": [USER, FINE]}])
    said = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0, status=1)
    assert "a.jsonl: line 2" in said and "--unusable drop" in said and names(tmp_path / "out") == []
    said = prepare(path, folder, tmp_path / "out", "-t", 200, "--val-fraction", 0, "--unusable", "drop")
    assert "dropped: 9 that cannot be used\n" in said and said.count("dropped: ") == 6 and "more of them are only counted" in said
    assert len([ids for row in rows_of(tmp_path / "out/train.bin", 200) for ids in row]) == 2
    for line in (2, 3, 4):
        assert f"a.jsonl: line {line}" in said

def test_all_masked_is_an_error(tmp_path):
    library("jinja2")
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [USER]}] * 3 + [{"input_ids": [1, 2], "labels": [-100, -100]}])
    said = prepare(path, model(tmp_path / "m", CHATML), tmp_path / "out", status=1)
    assert said == ("text.py: no example has a token to train on, so nothing is written (dropped: 4 without a trained token); --show 3 shows the first three")
    assert names(tmp_path / "out") == []

def test_examples_of_validation_that_are_trained_on_are_said(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", [{"prompt": str(i), "completion": "x"} for i in [*range(16), 0, 0, 1, 99]])
    said = prepare(path, "bytes", tmp_path / "out", "-t", 16, "--val-fraction", 0.2)
    assert "\nin training and validation alike, token for token: 3 of validation's 4 examples" in said
    assert "alike" not in prepare(lines_of(path, [{"prompt": str(i), "completion": "x"} for i in range(20)]), "bytes", tmp_path / "out", "-t", 16)
    said = prepare(lines_of(path, [{"text": "a"}]), "bytes", tmp_path / "out", status=1)
    assert "examples with a token to train on: 1, too few to split" in said
    assert "examples                       1               1\n" in prepare(lines_of(path, [{"text": "a"}, {"text": "b"}]), "bytes", tmp_path / "out")

def test_show(tmp_path):
    library("jinja2")
    folder = model(tmp_path / "m", CHATML)
    odd = {"role": "user", "content": "\x1b[31m\a\x85\u202e\u2028{+ \u00e9\U0001f600"}
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [odd, FINE, USER]}, {"messages": [USER]}, {"text": "x" * 3000}, {"text": 3}])
    said = script("prepro/text.py", path, "--tokenizer", folder, "--show", 3, "-t", 64, cwd=tmp_path)
    assert names(tmp_path) == ["a.jsonl", "m"], "without --out it only prints"
    assert said.startswith(f"---- {path}: line 1: 65 tokens, 6 trained, 1 of them cut\n"
                           "<|im_start|>user\n\\x1b[31m\\x07\\x85\\u202e\\u2028{+ \u00e9\U0001f600<|im_end|>\n"
                           "<|im_start|>assistant\n{+Fine.<|im_end|>+}\n<|im_start|>user\nHi there<|im_end|>[-\n-]\n"
                           f"---- {path}: line 2: 16 tokens, 0 trained; dropped: without a trained token\n")
    assert said.endswith("... and 941 characters-]\n") and not re.search("[^\n -~\u00a1-\U0001ffff]|[\u2028\u202e]", said)
    encode = encoder(folder)
    ids = encode("a", {"messages": [USER, FINE]})
    green = chat.shown(ids, 1000, encode.tokenizer.tokens, True)
    assert green == "\33[2m<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n\33[0m\33[32mFine.<|im_end|>\33[0m\33[2m\n\33[0m"
    assert chat.shown(ids, len(ids) - 1, encode.tokenizer.tokens, True).endswith("\33[31m\n\33[0m")
    said = run(lines_of(path, [{"messages": [USER, FINE]}] * 3), "--tokenizer", folder, "--show", 1, "--out", tmp_path / "out", "-t", 50)
    assert said.count("---- ") == 1 and len(rows_of(tmp_path / "out/train.bin", 50)) == 2
    assert names(tmp_path / "out") == ["tokenizer.bin", "train.bin", "val.bin"]

@pytest.mark.parametrize("content", [
    b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n', b'  [{"text": "a"},\n {"text": "b"}]', b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]',
    b'{"text": "a"}\n{"text": "b"}'], ids=range(4))
def test_lines_and_lists(tmp_path, content, monkeypatch):
    expected = [[(i | (3 << 30 if k == 0 else 0)) for k, i in enumerate((256, c, 256))] for c in b"ab"]
    for name, more in ((".jsonl", []), (".txt", ["--format", "text"]), (".json", ["--format", "auto"]), *([(".json", [])] if b"[" in content else [])):
        path = tmp_path / f"a{name}"
        path.write_bytes(content)
        prepare(path, "bytes", tmp_path / "out", "--val-fraction", 0, "-t", 4, *more)
        raw = (tmp_path / "out/train.bin").read_bytes()[1024:]
        rows = np.frombuffer(raw, np.uint32)[:-1].reshape(-1, 4)[:, :3].tolist()
        assert sorted(rows) == expected
    for block in (1, 2, 3, 7):
        parts = [content[:8], *(content[i:i + block] for i in range(8, len(content), block))]
        assert [record for _, record in chat.records("a", parts)] == [{"text": "a"}, {"text": "b"}]

def test_examples_and_texts_are_told_apart(tmp_path):
    examples, plain, json_text = lines_of(tmp_path / "a.jsonl", [{"text": "a"}] * 9), tmp_path / "a.txt", tmp_path / "a.json"
    plain.write_text("x" * 100)
    json_text.write_text('{"text": "a"}\n' * 9)
    out = tmp_path / "out"

    def fails(what, *args):
        said = run(*args, "--out", out, status=1)
        assert re.search(what, said) and not out.exists(), said
    fails("a.txt: is a plain text, and .*a.jsonl holds examples", examples, plain)
    for more in (["--show", 1], ["-t", 8], ["--no-pack"], ["--seed", 3], ["--train-on", "all"], ["--template", plain], ["--too-long", "cut"]):
        fails(f"{more[0] if more[0] != '-t' else '--seq-len'}: is for examples, and .*a.txt is a plain text", plain, *more)
    fails("--newlines lf: is for plain texts", examples, "--newlines", "lf")
    for name, value in (("seq-len", 1), ("seed", -1), ("show", 0)):
        fails(f"--{name} {value}: expected", examples, f"--{name}", value)
    said = run(json_text, "--out", out)
    assert f"{json_text}: is taken for a plain text, by its name, though its first line is an example with text; --format auto takes it" in said
    assert "is taken for" not in run(plain, "--out", out)
    assert binfmt.read_tokens(out / "train.bin").dtype == np.uint16, "a .json that is no list is a text, as it always was"
    empty = tmp_path / "e.jsonl"
    for content in ("", "\n\n", "[]"):
        empty.write_text(content)
        assert "e.jsonl: expected examples, found none" in prepare(empty, "bytes", out, status=1)

def test_what_a_conversation_needs(tmp_path, monkeypatch):
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [USER, FINE]}] * 3)
    assert "line 1: a conversation needs a model's tokenizer; name its directory" in prepare(path, "bytes", tmp_path / "out", status=1)
    folder = model(tmp_path / "m")
    said = prepare(path, folder, tmp_path / "out", status=1)
    assert "line 1: a conversation needs a chat template, and this tokenizer comes with none" in said and "--template FILE" in said
    library("jinja2")
    (tmp_path / "t").write_text(CHATML)
    for tokenizer in (folder, folder / "tokenizer.json"):
        prepare(path, tokenizer, tmp_path / "out", "--template", tmp_path / "t")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "a chat template needs the jinja2 library: " in prepare(path, model(tmp_path / "m", CHATML), tmp_path / "out", status=1)
    prepare(lines_of(path, [{"prompt": "a", "completion": "b"}] * 3), folder, tmp_path / "out")  # which has a template, but does not need it

def test_other_tokenizers(tmp_path):
    """What needs no template goes with bytes, and with GPT-2's."""
    path = lines_of(tmp_path / "a.jsonl", [{"prompt": "\u00e9", "completion": "b"}, {"input_ids": [256, 3]}])
    prepare(path, "bytes", tmp_path / "out", "-t", 8, "--val-fraction", 0)
    assert rows_of(tmp_path / "out/train.bin", 8, 256) == [[[0xc3 | 3 << 30, 0xa9 | 1 << 31, 98, 256], [256 | 3 << 30, 3]]]

# ---- dev/bench/instructions.py ---------------------------------------------------------------------

def test_instructions(tmp_path):
    script("dev/bench/instructions.py", "--out", tmp_path)
    train, test = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "test"))
    asked = [example["messages"][1]["content"] for example in train + test]
    assert (len(train), len(test)) == (800, 200) and len(set(asked)) == 1000 and {e["kind"] for e in test} == set(instructions.KINDS)
    checks = {"sum": lambda q: eval(q.rstrip("=")), "difference": lambda q: eval(q.rstrip("=")), "larger": lambda q: max(map(int, re.findall(r"\d+", q))),
              "count": lambda q: q[:-1].split()[-1].count(q.split()[2]), "join": lambda q: "".join(q.split()[1:]), "reverse": lambda q: q.split()[-1][::-1],
              "last": lambda q: q[-1], "capitals": lambda q: q.split()[-1].upper(), "sort": lambda q: "".join(sorted(q.split()[-1]))}
    for example in train + test:
        _, question, answer = (m["content"] for m in example["messages"])
        assert str(checks[example["kind"]](question)) == answer
    right = [example["messages"][2]["content"] for example in test]
    assert instructions.score([f" {a}\n" for a in right], test)["all"] == (200, 200)
    found = instructions.score(["no"] + right[1:], test)
    assert found["all"] == (199, 200) and found[test[0]["kind"]][0] == found[test[0]["kind"]][1] - 1
    before = (tmp_path / "test.jsonl").read_bytes()
    script("dev/bench/instructions.py", "--out", tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() == before
    script("dev/bench/instructions.py", "--out", tmp_path / "two", "--kinds", "sum,join", "--train", 6, "--test", 4)
    assert {json.loads(line)["kind"] for line in (tmp_path / "two/test.jsonl").read_text().splitlines()} <= {"sum", "join"}
    assert "--kinds sums" in script("dev/bench/instructions.py", "--out", tmp_path, "--kinds", "sums", status=2)
    assert "there are not so many" in script("dev/bench/instructions.py", "--out", tmp_path, "--train", 5000, status=1)
    with pytest.raises(ValueError, match="expected 200 answers"):
        instructions.score(right[1:], test)
