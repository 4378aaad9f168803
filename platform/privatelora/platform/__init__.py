"""The platform: composes service and device behind the `privatelora` command, with its settings in one place."""
