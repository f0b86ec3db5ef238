"""A tiny sentence encoder in a folder."""

import json

from support import tiny, words

KINDS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def write(folder, kinds=KINDS, pooling=None, **files):
    """A tiny BERT in a folder as sentence-transformers writes it."""
    tiny.classifier(vocab_size=len(words.VOCABULARY)).base_model.save_pretrained(folder)
    words.enclosing().save_pretrained(folder)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": tiny.HIDDEN, **(pooling or {"pooling_mode_mean_tokens": True})})
    )
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)
