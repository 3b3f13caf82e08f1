-- Windows over one entity's daily aggregates, strictly before day {{ as_of }} (days since 1970).
-- A rate is smoothed towards the rate of all events in the same window and, with `relative`,
-- divided by it (null where that is 0). Impressions are a mean per day of the window that the log
-- has; a sum would grow from day to day while the log is shorter than the window.
with recent as (
    select *
    from daily
    where "day" < {{ as_of }} and "day" >= {{ as_of - longest }}
),

overall as (
    select
        {%- for window in windows %}
        count(
            distinct case when "day" >= {{ as_of - window }} then "day" end
        ) as "days_{{ window }}d",
        {%- for signal in signals %}
        sum(
            case when "day" >= {{ as_of - window }} then "{{ signal }}_sum" else 0.0 end
        ) / sum(
            case when "day" >= {{ as_of - window }} then "{{ signal }}_count" else 0 end
        ) as "prior_{{ signal }}_{{ window }}d"
        {%- if not loop.last %},{% endif %}
        {%- endfor %}
        {%- if not loop.last %},{% endif %}
        {%- endfor %}
    from totals
    where "day" < {{ as_of }} and "day" >= {{ as_of - longest }}
),

summed as (
    select
        {%- for key in keys %}
        "{{ key }}",
        {%- endfor %}
        {%- for window in windows %}
        {%- if window == longest %}
        sum("impressions") as "impressions_{{ window }}d",
        {%- for signal in signals %}
        sum("{{ signal }}_count") as "{{ signal }}_count_{{ window }}d",
        sum("{{ signal }}_sum") as "{{ signal }}_sum_{{ window }}d",
        {%- endfor %}
        {%- else %}
        sum(
            case when "day" >= {{ as_of - window }} then "impressions" else 0 end
        ) as "impressions_{{ window }}d",
        {%- for signal in signals %}
        sum(
            case when "day" >= {{ as_of - window }} then "{{ signal }}_count" else 0 end
        ) as "{{ signal }}_count_{{ window }}d",
        sum(
            case when "day" >= {{ as_of - window }} then "{{ signal }}_sum" else 0.0 end
        ) as "{{ signal }}_sum_{{ window }}d",
        {%- endfor %}
        {%- endif %}
        {%- endfor %}
        max("day") as last_day
    from recent
    group by
        {%- for key in keys %}
        "{{ key }}"{% if not loop.last %},{% endif %}
        {%- endfor %}
),

final as (
    select
        {%- for key in keys %}
        "{{ key }}",
        {%- endfor %}
        {%- for window in windows %}
        cast("impressions_{{ window }}d" as double)
        / case when "days_{{ window }}d" > 0 then "days_{{ window }}d" else 1 end
        as "{{ prefix }}_daily_impressions_{{ window }}d",
        {%- for signal in signals %}
        ("{{ signal }}_sum_{{ window }}d" + {{ smoothing }} * "prior_{{ signal }}_{{ window }}d")
        / ("{{ signal }}_count_{{ window }}d" + {{ smoothing }})
        {%- if relative %}
        / case
            when "prior_{{ signal }}_{{ window }}d" > 0 then "prior_{{ signal }}_{{ window }}d"
        end
        {%- endif %}
        as "{{ prefix }}_{{ signal }}_rate_{{ window }}d",
        {%- endfor %}
        {%- endfor %}
        {{ as_of }} - "last_day" as "{{ prefix }}_days_since"
    from summed
    cross join overall
)

select * from final
