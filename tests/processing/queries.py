"""Conversations, and the queries that a processor should make of them, written out by hand."""

__all__ = ["BOS", "EOS", "MISTRAL_TEMPLATE", "QUERY_KEYS", "assert_queries", "chat", "hand_made", "ids_of", "turn"]

BOS, EOS = 0, 1  # of `tiny_tokenizers.clip_tokenizer`
QUERY_KEYS = ["query_input_ids", "query_attention_mask"]

# The template of llava-hf/llava-v1.6-mistral-7b-hf.
MISTRAL_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)


def turn(role, *parts):
    """A message of text parts; a part that is no string is an image."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def ids_of(words, processor):
    """The tokens of a query, by the CLIP tokenizer alone."""
    return processor.query_tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]


def hand_made(words, processor, chunks=None):
    """Ids and mask of one row: chunks of 75 tokens, each between 0 and 1, padded with 1 to 77."""
    tokens = ids_of(words, processor)
    ids, mask = [], []
    while tokens:
        head, tokens = tokens[:75], tokens[75:]
        ids += [BOS] + head + [EOS] + [EOS] * (75 - len(head))
        mask += [1] * (len(head) + 2) + [0] * (75 - len(head))
    width = 77 * (chunks or max(1, len(ids) // 77))
    return ids + [EOS] * (width - len(ids)), mask + [0] * (width - len(mask))


def assert_queries(inputs, expected, processor):
    """The rows of `inputs` hold exactly these queries."""
    chunks = max(1, *(-(-len(ids_of(words, processor)) // 75) for words in expected), 0)
    rows = [hand_made(words, processor, chunks) for words in expected]
    for position, key in enumerate(QUERY_KEYS):
        got = inputs[key]
        assert (got.tolist() if hasattr(got, "tolist") else got) == [row[position] for row in rows], key


def chat(processor, conversation, **kwargs):
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"} | kwargs
    return processor.apply_chat_template(conversation, **kwargs)
