-- Impressions or candidates of day {{ as_of }} joined to the features known at its start.
-- The same query is used for training and scoring.
with final as (
    select
        {%- for entity in entities %}
        {%- for feature in entity.features %}
        "{{ entity.name }}"."{{ feature }}",
        {%- endfor %}
        {%- endfor %}
        {%- if published %}
        {{ as_of }} - "rows"."{{ published }}" as item_age_days,
        {%- endif %}
        "rows".*
    from "rows"
    {%- for entity in entities %}
    left join "{{ entity.name }}"
        on
            {%- for key in entity["keys"] %}
            "rows"."{{ key }}" = "{{ entity.name }}"."{{ key }}"
            {%- if not loop.last %} and{% endif %}
            {%- endfor %}
    {%- endfor %}
)

select * from final
