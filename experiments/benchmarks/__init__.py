"""What measures or checks the project itself: no verb of ``ehr``, and not part of the wheel."""
