"""What a training reports: metrics file, throughput. In no code digest: decides no bytes."""
