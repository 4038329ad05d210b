"""`python -m nystromgan.zoo.demo`: the self-attention block on a real video, exactly and through landmarks."""
