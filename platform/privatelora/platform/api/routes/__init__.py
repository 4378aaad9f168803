"""The API's resources, a file each; `ROUTERS` is what `create_app` includes, in the order of the OpenAPI document."""

from privatelora.platform.api.routes import (
    adapters,
    agent,
    api_keys,
    audit_log,
    backbones,
    devices,
    events,
    health,
    info,
    jobs,
    me,
    metrics,
    models,
    prometheus,
    quotas,
    schedules,
    sessions,
    usage,
    users,
)

ROUTERS = [
    module.router
    for module in (
        me,
        users,
        api_keys,
        devices,
        agent,
        backbones,
        sessions,
        quotas,
        jobs,
        schedules,
        usage,
        adapters,
        models,
        audit_log,
        metrics,
        events,
        info,
        health,
        prometheus,
    )
]
