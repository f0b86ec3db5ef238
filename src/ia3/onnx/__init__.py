"""An adapter, its base model and its task as a folder that onnxruntime answers with."""
