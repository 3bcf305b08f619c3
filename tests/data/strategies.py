"""Texts and documents that hypothesis draws: whatever markup, Unicode and the model's names can do."""

from hypothesis import strategies as st

from vlcpt import Document, Image, Text, Video

CONTROL = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<tool_call>",
    "<|fim_prefix|>",
]
PIECES = [
    *("<trainable_text>", "</trainable_text>", '<trainable_text weight="0.5">', "<trainable_text", "text>"),
    *("<Trainable_Text>", "</trainble_text>", "< trainable-text", "<trainabletex", "<trainable_te", "x_text"),
    *("<image>", "<video>", "<IMG1>", "<VID12>", "<IMG0", "<", ">", "\\", "\\\\", "/"),
    *CONTROL,
    *("<|", "|>", "image_pad", "tool_call", "<tool", "_call>", "fim_prefix"),
    *("<p class='a'>", "</p>", "&lt;", "if x:\n    y = 1\n", "\t", "\r\n", "{}", "$x^2$", "'s", "it's"),
    *(" ", "  ", "\n", "\n\n", "\u3000", "\u00a0", "\u200b", "a", " word", "Word", "12", "3.5", "½", "Ⅷ"),
    *("e", "\u0301", "\u0323", "é", "ạ", "\u0958", "\u1100", "\u1161", "\u11a8", "각", "\u09c7", "\u09be"),
    *("中文", "。", "，", "の", "ไทย", "हिन्दी", "עברית", "😀", "🧑‍🔬", "👍🏽", "🇩🇪", "\ufe0f", "\U00020000"),
]  # fmt: skip

pieces = st.sampled_from(PIECES)
texts = st.lists(pieces | st.characters(codec="utf-8"), min_size=1, max_size=6).map("".join)
weights = st.sampled_from([1.0, 0.3, 2.5, 100.0, 1e-7]) | st.floats(1e-6, 100)
text_segments = st.builds(Text, texts | st.just(""), st.booleans(), weights)
images = st.builds(Image, st.sampled_from(["a.png", "b/c.jpg"]), max_pixels=st.none() | st.just(50_176))
videos = st.builds(Video, st.just("a.mp4"), fps=st.none() | st.just(1.0))
documents = st.lists(text_segments | images | videos, max_size=8).map(lambda found: Document(tuple(found)))
