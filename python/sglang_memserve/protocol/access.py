"""Which of an instance's two keys its routes ask for: what SGLang's ``srt.utils.auth`` does there.

The API key opens what clients, peers and routers use. What SGLang counts as control needs the admin
key where there is one, and then nothing else will do; nor will the admin key for the rest.
"""

from __future__ import annotations

# SGLang 0.5.23's routes of level ADMIN_OPTIONAL.
ENGINE_CONTROL = frozenset(
    {
        "/abort_request",
        "/add_external_corpus",
        "/begin_weight_update",
        "/configure_logging",
        "/continue_generation",
        "/destroy_weights_update_group",
        "/dump_expert_distribution_record",
        "/end_weight_update",
        "/flush_cache",
        "/freeze_gc",
        "/get_remote_instance_transfer_engine_info",
        "/get_weights_by_name",
        "/init_weights_send_group_for_remote_instance",
        "/init_weights_update_group",
        "/is_scaling_elastic_ep",
        "/list_external_corpora",
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/pause_generation",
        "/pd_role_switch",
        "/release_memory_occupation",
        "/remote_instance_transfer_engine_info",
        "/remove_external_corpus",
        "/resume_memory_occupation",
        "/scale_elastic_ep",
        "/send_weights_to_remote_instance",
        "/set_internal_state",
        "/set_trace_level",
        "/slow_down",
        "/start_expert_distribution_record",
        "/start_profile",
        "/stop_expert_distribution_record",
        "/stop_profile",
        "/unload_lora_adapter",
        "/update_weight_version",
        "/update_weights_from_disk",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/update_weights_from_tensor",
        "/weights_checker",
    }
)
ENGINE_CONTROL_FOLDERS = ("/dumper/", "/hicache/")
# Our own routes that change an instance or tell what it holds of a prompt. What peers and routers
# ask for all the time (info, snapshot, stats, fetch, peers) takes the API key.
MEMSERVE_CONTROL = frozenset(
    {
        "/memserve/match",
        "/memserve/pool",
        "/memserve/role",
        "/memserve/swap_in",
        "/memserve/swap_out",
    }
)


def needs_admin_key(path: str) -> bool:
    """Whether ``path`` (decoded, without a query) is control on an instance with an admin key."""
    return (
        path in ENGINE_CONTROL
        or path in MEMSERVE_CONTROL
        or path.startswith(ENGINE_CONTROL_FOLDERS)
    )


def key_for(path: str, api: str | None, admin: str | None) -> str | None:
    """The key to show to an instance that has these two, with a request for ``path``."""
    return admin if admin and needs_admin_key(path.rstrip("/")) else api
