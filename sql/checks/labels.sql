-- Number of present labels of each objective, and their sum, over examples.
select
    {%- for objective in objectives %}
    count("label_{{ objective }}") as "{{ objective }}_count",
    sum("label_{{ objective }}") as "{{ objective }}_sum",
    {%- endfor %}
    count(*) as example_count
from examples
