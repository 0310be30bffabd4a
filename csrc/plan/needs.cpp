#include "plan/needs.h"

#include "math/rules.h"

namespace gradfused {

Needs needs_of(const Row& row, const Settings& settings, int64_t longest) {
  Needs needs = Need::step;
  const auto need = [&needs](bool needed, Needs bits) { needs |= needed ? bits : 0; };
  const math::RuleTraits rule = math::traits_of(row.rule);
  const bool is_long = row.unit_length > longest, early = settings.centralize_at == Centre::gradient;
  const bool by_unit = settings.norm_scope == NormScope::unit, mean_is_split = row.centre && (row.whole || is_long);
  const bool adapts = settings.adapt && rule.trust != math::Trust::none;
  // A late mean of the direction depends on the gradient's trust ratio, and that ratio on a late mean of the decayed gradient.
  const bool early_trust = adapts && rule.trust == math::Trust::gradient && settings.centralize_at != Centre::decayed;

  need(mean_is_split && early, Need::means);
  need(is_wide(settings.norm_scope) || settings.skip_nonfinite || (by_unit && is_long), Need::norms);
  need(early_trust, Need::early_trust);
  need(mean_is_split && !early, Need::late_means);
  need(adapts && !early_trust, Need::late_trust);

  need(is_long, Need::long_units);
  need(mean_is_split || (by_unit && is_long), Need::split);
  need(row.centre && early, Need::centre_early);
  need(row.centre && settings.centralize_at == Centre::decayed, Need::centre_decayed);
  need(row.centre && settings.centralize_at == Centre::update, Need::centre_update);
  need(settings.norm_scope == NormScope::global, Need::global_norm);
  need(is_wide(settings.norm_scope), Need::wide_norm);
  need(by_unit, Need::unit_norms);
  need(settings.agc, Need::agc);
  need(settings.skip_nonfinite, Need::skip);
  need(settings.noise > 0, Need::noise);
  need(row.source.data, Need::source);
  need(row.master.data, Need::copy);
  need(row.precision == Precision::kahan, Need::kahan);
  need(row.precision == Precision::stochastic, Need::stochastic);
  need(row.precision == Precision::master, Need::master);
  need(row.ema.data, Need::ema);
  need(settings.zero_grad_in_step, Need::zero_grad_in_step);
  need(row.mu_product, Need::mu_product);
  need(row.numel == 0, Need::empty);

  const bool is_lean = rule.trust == math::Trust::none && rule.states <= kLeanStates && row.param.dtype != DType::float64;
  need(!is_lean || (needs & (Need::noise | Need::unit_norms | Need::centre_late | Need::riders)), Need::full);
  return needs;
}

}  // namespace gradfused
