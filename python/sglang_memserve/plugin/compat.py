"""What we touch of SGLang, and the version it was taken from.

Moving the pin: change ``SGLANG_VERSION``, run ``test/unit/test_compat.py``, and mend what it names.
The test also reads this package's sources, so an import that is not listed here fails it.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from collections.abc import Mapping

SGLANG_VERSION = "0.5.23"

SYMBOLS = (
    # Plugin points, meant for us
    "sglang.srt.platforms.cpu.CpuDeviceMixin",
    "sglang.srt.platforms.device_mixin.PlatformEnum",
    "sglang.srt.platforms.interface.SRTPlatform",
    "sglang.srt.plugins.load_plugins",
    "sglang.srt.plugins.hook_registry.HookRegistry",
    "sglang.srt.plugins.hook_registry.HookType",
    "sglang.srt.server_args.ATTENTION_BACKEND_CHOICES",
    "sglang.srt.server_args.add_attention_backend_choices",
    "sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
    "sglang.srt.layers.attention.attention_registry.register_attention_backend",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker.LayerWiseLoadCounter",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinker",
    # The server and its settings
    "sglang.srt.entrypoints.engine.init_tokenizer_manager",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.entrypoints.http_server.app",
    "sglang.srt.entrypoints.http_server.get_global_state",
    "sglang.srt.entrypoints.http_server.launch_server",
    "sglang.srt.managers.io_struct.BaseReq",
    "sglang.srt.managers.io_struct.hook_custom_types",
    "sglang.srt.managers.tokenizer_manager.ServerStatus",
    "sglang.srt.managers.tokenizer_manager.SignalHandler",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager",
    "sglang.srt.parser.template_manager.TemplateManager",
    "sglang.srt.runtime_context.get_parallel",
    "sglang.srt.server_args.PortArgs",
    "sglang.srt.server_args.ServerArgs",
    "sglang.srt.server_args.prepare_server_args",
    "sglang.srt.utils.auth.AuthLevel",
    "sglang.srt.utils.auth.auth_level",
    "sglang.srt.utils.kill_process_tree",
    "sglang.srt.utils.server_args_config_parser.ConfigArgumentMerger",
    "sglang.utils.TypeBasedDispatcher",
    # KV pools and what the engine says about a batch
    "sglang.srt.layers.radix_attention.AttentionType",
    "sglang.srt.layers.radix_attention.RadixAttention",
    "sglang.srt.mem_cache.base_prefix_cache.InsertParams",
    "sglang.srt.mem_cache.base_prefix_cache.MatchPrefixParams",
    "sglang.srt.mem_cache.cache_init_params.CacheInitParams",
    "sglang.srt.mem_cache.hicache_storage.PoolName",
    "sglang.srt.mem_cache.hicache_storage.PoolTransfer",
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
    "sglang.srt.mem_cache.radix_cache.RadixKey",
    "sglang.srt.mem_cache.swa_memory_pool.SWAKVPool",
    "sglang.srt.mem_cache.unified_cache.component_type.ComponentType",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    "sglang.srt.model_executor.model_runner.ModelRunner",
    # The model's own operations, in whose place native ones are put
    "sglang.kernels.fused_op.BaseFusedOp",
    "sglang.srt.layers.activation.GeluAndMul",
    "sglang.srt.layers.activation.SiluAndMul",
    "sglang.srt.layers.layernorm.GemmaRMSNorm",
    "sglang.srt.layers.layernorm.RMSNorm",
    "sglang.srt.layers.quantization.unquant.UnquantizedEmbeddingMethod",
    "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod",
    "sglang.srt.layers.rotary_embedding.base.LinearScalingRotaryEmbedding",
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding",
    "sglang.srt.layers.rotary_embedding.rope_variant.DynamicNTKScalingRotaryEmbedding",
    "sglang.srt.layers.rotary_embedding.rope_variant.Llama3RotaryEmbedding",
    "sglang.srt.layers.rotary_embedding.yarn.YaRNScalingRotaryEmbedding",
    "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding",
    "sglang.srt.model_executor.forward_batch_info.ForwardMode",
    "sglang.srt.model_executor.forward_context.get_attn_backend",
    "sglang.srt.model_executor.forward_context.has_forward_context",
    "sglang.srt.models.llama.LlamaAttention",
    "sglang.srt.models.llama.LlamaDecoderLayer",
    "sglang.srt.models.llama.LlamaMLP",
    "sglang.srt.models.llama.LlamaModel",
    "sglang.srt.models.qwen2.Qwen2Attention",
    "sglang.srt.models.qwen2.Qwen2DecoderLayer",
    "sglang.srt.models.qwen2.Qwen2MLP",
    "sglang.srt.models.qwen2.Qwen2Model",
    "sglang.srt.models.qwen3.Qwen3Attention",
    "sglang.srt.models.qwen3.Qwen3DecoderLayer",
    "sglang.srt.models.qwen3.Qwen3MLP",
    "sglang.srt.models.qwen3.Qwen3Model",
    # Private, or replaced by a hook: the first to look at when the pin moves
    "sglang.srt.managers.scheduler.Scheduler",
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache",
    "sglang.srt.entrypoints.http_server._execute_server_warmup",
    "sglang.srt.mem_cache.allocation.get_last_loc",
    "sglang.srt.mem_cache.cpp_utils.native_hash.get_native_hash",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper",
    "sglang.srt.plugins.hook_registry.HookRegistry._hooks",
)

_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"

METHODS = (
    "sglang.kernels.fused_op.BaseFusedOp.register_oot_forward",
    "sglang.srt.managers.scheduler.Scheduler.flush_cache",
    "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
    "sglang.srt.managers.scheduler.Scheduler.is_fully_idle",
    "sglang.srt.managers.scheduler.Scheduler.on_idle",
    "sglang.srt.managers.scheduler.Scheduler.send_control_output",
    "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.get_value_buffer",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
    "sglang.srt.mem_cache.swa_memory_pool.SWAKVPool.translate_loc_from_full_to_swa",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper."
    "_offload_node",
    "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper."
    "release_request",
    f"{_CACHE}._evict_device_leaf",
    f"{_CACHE}.check_hicache_events",
    f"{_CACHE}.dec_lock_ref",
    f"{_CACHE}.evictable_size",
    f"{_CACHE}.get_last_hash_value",
    f"{_CACHE}.inc_lock_ref",
    f"{_CACHE}.insert",
    f"{_CACHE}.match_prefix",
    f"{_CACHE}.path_device_indices",
    f"{_CACHE}.protected_size",
    f"{_CORE}.collect_full_device_indices",
    f"{_CORE}.collect_path_info",
    f"{_CORE}.evict_device_end",
    f"{_CORE}.evict_device_next_node",
    f"{_CORE}.evict_device_start",
    f"{_CORE}.full_evictable_size",
    f"{_CORE}.get_hash_values",
    f"{_CORE}.match_full_device_prefix",
    "sglang.srt.platforms.interface.SRTPlatform.apply_server_args_defaults",
    "sglang.srt.platforms.interface.SRTPlatform.init_backend",
    "sglang.srt.platforms.interface.SRTPlatform.post_load_model",
    "sglang.srt.server_args.ServerArgs.add_cli_args",
    "sglang.srt.server_args.ServerArgs.resolve_once",
    "sglang.srt.server_args.ServerArgs.url",
)

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "sglang.srt.entrypoints.http_server.launch_server": (
        "server_args",
        "init_tokenizer_manager_func",
        "execute_warmup_func",
        "launch_callback",
    ),
    "sglang.srt.entrypoints.engine.init_tokenizer_manager": ("server_args", "port_args"),
    "sglang.srt.mem_cache.allocation.get_last_loc": (
        "req_to_token",
        "req_pool_indices_tensor",
        "prefix_lens_tensor",
    ),
    "sglang.srt.mem_cache.cache_init_params.CacheInitParams": (
        "page_size",
        "tp_cache_group",
        "attn_cp_cache_group",
        "attn_tp_cache_group",
    ),
    "sglang.srt.mem_cache.cpp_utils.native_hash.get_native_hash": (
        "token_ids",
        "prior_digest",
        "page_size",
    ),
    "sglang.srt.layers.layernorm.GemmaRMSNorm.forward_native": (
        "self",
        "x",
        "residual",
        "post_residual_addition",
    ),
    "sglang.srt.layers.layernorm.RMSNorm.forward_native": (
        "self",
        "x",
        "residual",
        "post_residual_addition",
        "quant_linear",
    ),
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native": (
        "self",
        "positions",
        "query",
        "key",
        "offsets",
        "fused_set_kv_buffer_arg",
    ),
    "sglang.srt.mem_cache.memory_pool.KVWriteLoc": ("loc", "swa_loc"),
    "sglang.srt.models.llama.LlamaModel.forward": (
        "self",
        "input_ids",
        "positions",
        "forward_batch",
        "input_embeds",
        "pp_proxy_tensors",
    ),
    "sglang.srt.models.qwen2.Qwen2Model.forward": (
        "self",
        "input_ids",
        "positions",
        "forward_batch",
        "input_embeds",
        "pp_proxy_tensors",
    ),
    "sglang.srt.utils.kill_process_tree": ("parent_pid", "include_parent", "wait_timeout"),
}
"""Parameters we pass by name or rely on the order of."""


def installed_version() -> str:
    return importlib.metadata.version("sglang")


def unresolved() -> list[str]:
    """Of all names above, those that the installed SGLang does not have, with the reason."""
    problems = []
    for name in (*SYMBOLS, *METHODS):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return problems
