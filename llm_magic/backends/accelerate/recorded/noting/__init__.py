"""How a recording comes to be: a layer's code runs on stand-ins, and what it asks torch for is written down."""
