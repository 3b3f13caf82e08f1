-- One partition of events aggregated to one row per entity and day: number of impressions, and for
-- each signal the number of labels that are present and their sum.
select
    "day",
    {%- for key in keys %}
    "{{ key }}",
    {%- endfor %}
    {%- for signal in signals %}
    count("{{ signal }}") as "{{ signal }}_count",
    coalesce(sum("{{ signal }}"), 0.0) as "{{ signal }}_sum",
    {%- endfor %}
    count(*) as impressions
from events
{%- if keys %}
where
    {%- for key in keys %}
    "{{ key }}" is not null
    {%- if not loop.last %} and{% endif %}
    {%- endfor %}
{%- endif %}
group by
    "day"
    {%- for key in keys %},
    "{{ key }}"
    {%- endfor %}
