"""The contract as documents: JSON Schemas and an AsyncAPI document, made from the models.

``payloads`` lists everything that travels, ``schemas`` describes each, ``asyncapi`` says where it travels,
``documents`` writes them all to ``contracts/`` and tells whether what is there is still true.
"""
