"""placeholder"""


def register() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend("memserve_cpu")
    def create(runner):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        return TorchNativeAttnBackend(runner)
