"""DeepSpeed configurations, chosen by name: ``--deepspeed zero2``."""
